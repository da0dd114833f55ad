"""The learning rate of each step, and what the optimisers do with the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sma.errors import SMAError
from sma_models.training.optimisation import build_optimiser, learning_rate
from sma_models.training.recipe import OptimiserConfig, load_recipe, recipe_names


def test_linear_schedule() -> None:
    config = OptimiserConfig(lr=1.0, warmup=4, power=1.0)
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])


def test_power_of_the_decay() -> None:
    squared = OptimiserConfig(lr=2.0, warmup=0, power=2.0)
    assert [learning_rate(squared, step, 4) for step in range(5)] == pytest.approx([2.0, 1.125, 0.5, 0.125, 0.0])
    kept = OptimiserConfig(lr=2.0, warmup=0, power=0.0)
    assert [learning_rate(kept, step, 4) for step in range(4)] == [2.0] * 4


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_peaks_at_its_learning_rate_and_ends_near_zero(name: str) -> None:
    recipe = load_recipe(name)
    steps, peak = recipe.train.steps, recipe.optimiser.lr
    assert learning_rate(recipe.optimiser, recipe.optimiser.warmup, steps) == peak
    assert 0 < learning_rate(recipe.optimiser, steps - 1, steps) < 0.01 * peak


@pytest.mark.parametrize("algorithm", ["adamw", "radam"])
def test_decay_is_apart_from_the_gradient(algorithm: str) -> None:
    """With a gradient of zero, one step shrinks the weights by exactly lr * weight_decay."""
    weight = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    optimiser = build_optimiser(OptimiserConfig(algorithm=algorithm, lr=0.1, weight_decay=0.5), [weight])  # type: ignore[arg-type]
    weight.grad = torch.zeros_like(weight)
    optimiser.step()
    assert torch.allclose(weight.detach(), torch.tensor([2.0, -3.0], dtype=torch.float64) * (1 - 0.1 * 0.5))


def test_what_is_not_trained_is_left_out() -> None:
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    optimiser = build_optimiser(OptimiserConfig(), [nn.Parameter(torch.ones(2)), frozen])
    assert [parameter.numel() for parameter in optimiser.param_groups[0]["params"]] == [2]


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("betas", (0.9, 1.0)), ("eps", 0.0), ("clip", 0.0), ("warmup", -1), ("power", -1.0)],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(SMAError, match=field):
        OptimiserConfig(**{field: value})  # type: ignore[arg-type]

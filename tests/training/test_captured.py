"""Steps as graphs: the same training as without them, whatever overflows on the way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import ConfigError
from sma.layer import SparseMixture
from sma.routing import Routing
from sma_models.training import captured
from sma_models.training.captured import CapturedSteps, capacity_for
from sma_models.training.data.batching import BatchPlan, loader
from sma_models.training.graphs import CudaGraphs
from sma_models.training.loop import build_model, open_task
from sma_models.training.objective import place
from sma_models.training.optimisation import build_optimiser
from sma_models.training.recipe import load_recipe
from sma_models.training.steps import EagerSteps, PartResult, Steps, Work
from tests.devices import DEVICE

PLAIN = ("model.dropout=0", "model.blocks[0].dropout=0", f"train.device={DEVICE}")
EXACT = ("train.precision=float64",)
ADAM = ("optimiser.algorithm=adamw",)


class Again:
    """Stands in for CUDA graphs on a CPU: what was captured is done by calling it again."""

    def __init__(self) -> None:
        self.captures = 0

    def rehearse(self, work: Callable[[], Any]) -> None:
        work()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        routings: dict[str, Routing] = {}

        def replay() -> None:
            result = work()
            if isinstance(result, PartResult):
                routings.update(result.routings)

        return replay, SimpleNamespace(routings=routings)


def graphs() -> Any:
    return CudaGraphs() if DEVICE.type == "cuda" else Again()


def work_of(recipe_file: str, *overrides: str) -> tuple[Work, list[list[Any]]]:
    """The work of a recipe, and the parts of each of its steps."""
    recipe = load_recipe(recipe_file, *PLAIN, *overrides)
    task = open_task(recipe)
    model = build_model(recipe).to(DEVICE).train()
    work = Work(model, task.kind, recipe, build_optimiser(recipe.optimiser, model.parameters()))
    plan = recipe.train
    batches = loader(task.train, BatchPlan(None, plan.part_size, seed=0), stop=plan.steps * plan.accumulate)
    parts = [place(batch, DEVICE, next(model.parameters()).dtype) for batch in batches]
    return work, [parts[k : k + plan.accumulate] for k in range(0, len(parts), plan.accumulate)]


def train(work: Work, steps: Steps, batches: list[list[Any]], *, settle_every: int = 1) -> list[float]:
    losses = []
    for step, parts in enumerate(batches):
        steps.run(step, parts, norm=True)
        if (step + 1) % settle_every == 0:
            result = steps.settle()
            losses.append(float(result.loss))
            assert result.gradient_norm is not None
            assert all(routing.overflow is None for routing in result.routings.values())
    return losses


def weights(work: Work) -> Tensor:
    state = work.model.state_dict().values()
    return torch.cat([value.detach().double().flatten().cpu() for value in state])


def both(recipe_file: str, *overrides: str, settle_every: int = 1) -> tuple[CapturedSteps, Any]:
    """Train with and without graphs; losses, weights and buffers agree."""
    work, batches = work_of(recipe_file, *overrides)
    expected = train(work, EagerSteps(work), batches, settle_every=settle_every)
    other, batches = work_of(recipe_file, *overrides)
    steps = CapturedSteps(other, required=True, graphs=graphs())
    losses = train(other, steps, batches, settle_every=settle_every)
    exact = "train.precision=float64" in overrides
    assert losses == pytest.approx(expected, rel=1e-9 if exact else 1e-4)
    steps.settle()
    torch.testing.assert_close(
        weights(other), weights(work), rtol=1e-7 if exact else 1e-3, atol=1e-9 if exact else 1e-4
    )
    assert all(layer.capacity is None for layer in other.model.modules() if isinstance(layer, SparseMixture))
    return steps, other


@pytest.mark.parametrize("algorithm", ["adamw", "adam", "radam"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("settle_every", [1, 7])
def test_the_same_training(tiny: str, algorithm: str, accumulate: int, settle_every: int) -> None:
    plan = [f"optimiser.algorithm={algorithm}", f"train.accumulate={accumulate}", "train.steps=14"]
    steps, _ = both(tiny, *plan, *EXACT, settle_every=settle_every)
    assert steps.why_not is None
    assert steps._passes


@pytest.mark.parametrize("algorithm", ["adamw", "radam"])
@pytest.mark.parametrize("settle_every", [1, 100])
def test_steps_that_exceed_a_capacity_are_skipped(
    tiny: str, algorithm: str, settle_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capacity of half the last active tokens: every other step overflows, and is run again."""
    again: list[int] = []
    plain = EagerSteps.run

    def noted(self: EagerSteps, step: int, parts: Any, *, norm: bool = False) -> None:
        again.append(step)
        plain(self, step, parts, norm=norm)

    monkeypatch.setattr(captured, "capacity_for", lambda usage: max(usage / 2, captured.SMALLEST))
    plan = [f"optimiser.algorithm={algorithm}", "train.steps=12", "train.accumulate=1"]
    work, batches = work_of(tiny, *plan, *EXACT)
    expected = train(work, EagerSteps(work), batches, settle_every=1)
    other, batches = work_of(tiny, *plan, *EXACT)
    steps = CapturedSteps(other, required=True, graphs=graphs())
    monkeypatch.setattr(EagerSteps, "run", noted)
    losses = train(other, steps, batches, settle_every=settle_every)
    assert float(steps.settle().loss) == pytest.approx(expected[-1], rel=1e-9)
    if settle_every == 1:
        assert losses == pytest.approx(expected, rel=1e-9)
    assert len(again) > 3
    assert steps.again > 2
    torch.testing.assert_close(weights(other), weights(work), rtol=1e-7, atol=1e-9)


def test_parts_of_several_shapes_while_capacities_change(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped step is found out just when the shape of its neighbour is captured: both are captured anew."""
    monkeypatch.setattr(captured, "capacity_for", lambda usage: captured.SMALLEST)
    always = [f"model.blocks[0].activate.{each}" for each in ("controller=null", "configurator={type: always}")]
    plan = (*always, "train.accumulate=2", "train.batch_size=32", "train.steps=9", *ADAM, *EXACT)

    def mixed(batches: list[list[Any]]) -> list[list[Any]]:
        def cut(part: Any) -> Any:
            return {name: None if tensor is None else tensor[:, :9] for name, tensor in part.items()}

        short = [[first, cut(second)] for first, second in batches]
        return [*batches[:2], short[2], batches[3], short[4], batches[5], short[6], batches[7], short[8]]

    work, batches = work_of(tiny, *plan)
    train(work, EagerSteps(work), mixed(batches))
    other, batches = work_of(tiny, *plan)
    steps = CapturedSteps(other, required=True, graphs=graphs())
    train(other, steps, mixed(batches), settle_every=100)
    steps.settle()
    assert steps.again > 0
    torch.testing.assert_close(weights(other), weights(work), rtol=1e-7, atol=1e-9)


def test_batch_norm_counts_only_the_steps_that_count(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "capacity_for", lambda usage: max(usage / 2, captured.SMALLEST))
    norm = ("model.blocks[0].norm=batchnorm", "train.steps=8", "train.accumulate=1")
    _, work = both(tiny, *norm, *ADAM, *EXACT)
    counted = [value for name, value in work.model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counted
    assert all(int(value) == 8 for value in counted)


def test_capacity_follows_what_is_needed(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows at once, and shrinks after a while in which much less was needed; the passes are captured anew."""
    monkeypatch.setattr(captured, "WINDOW", 16)
    work, batches = work_of(tiny, "train.steps=6", *ADAM, *EXACT)
    steps = CapturedSteps(work, required=True, graphs=graphs())
    train(work, steps, batches)
    first, second = ((layer, 0) for layer in steps._capacities)
    steps._note({first: 0.7, second: 0.1})
    assert steps._capacities[first[0]] == capacity_for(0.7)
    for _ in range(2 * captured.WINDOW):
        steps._note({first: 0.3, second: 0.1})
    assert steps._capacities[first[0]] == capacity_for(0.3) < capacity_for(0.7)
    assert not steps._passes
    before = steps.captured
    train(work, steps, batches)
    assert steps.captured > before


def test_a_capacity_of_the_spec_is_kept(tiny: str) -> None:
    work, batches = work_of(tiny, "model.blocks[0].activate.capacity=0.05", "train.steps=6", *ADAM)
    steps = CapturedSteps(work, required=True, graphs=graphs())
    for step, parts in enumerate(batches):
        steps.run(step, parts)
    overflow = [routing.overflow for routing in steps.settle().routings.values()]
    assert all(count is not None and int(count) > 0 for count in overflow)
    assert not steps._capacities


def test_what_waits_for_the_device_is_not_captured(tiny: str) -> None:
    class Refusing(Again):
        def rehearse(self, work: Callable[[], Any]) -> None:
            work()
            raise RuntimeError("called a synchronizing CUDA operation\nat a line")

    work, batches = work_of(tiny, "train.steps=6", *ADAM, *EXACT)
    expected = train(work, EagerSteps(work), batches)
    other, batches = work_of(tiny, "train.steps=6", *ADAM, *EXACT)
    steps = CapturedSteps(other, graphs=Refusing())
    assert train(other, steps, batches) == pytest.approx(expected, rel=1e-9)
    assert steps.why_not == "called a synchronizing CUDA operation"
    other, batches = work_of(tiny, "train.steps=6", *ADAM)
    with pytest.raises(ConfigError, match=r"train\.capture: must be false or null for this model, got true: called a"):
        train(other, CapturedSteps(other, required=True, graphs=Refusing()), batches)


def test_modules_without_a_fixed_capacity_say_so(tiny: str) -> None:
    module = "model.blocks[0].activate.module={type: moe, n_experts: 2, d_hidden: 8}"
    work, batches = work_of(tiny, module, "train.steps=6", *ADAM)
    steps = CapturedSteps(work, graphs=graphs())
    train(work, steps, batches)
    assert steps.why_not is not None
    assert "computes a loss over all rows; padding rows would change it" in steps.why_not


def test_capture_needs_a_cuda_device(tiny: str) -> None:
    recipe = load_recipe(tiny, "train.capture=true")
    with pytest.raises(ConfigError, match=r"train\.capture: must be false or null on the device cpu, got true"):
        recipe.train.captures(torch.device("cpu"))
    assert not load_recipe(tiny).train.captures(torch.device("cpu"))
    assert load_recipe(tiny).train.captures(torch.device("cuda"))
    assert not load_recipe(tiny, "train.capture=false").train.captures(torch.device("cuda"))


def test_capacities_are_few_and_large_enough() -> None:
    shares = [n / 1000 for n in range(1001)]
    capacities = [capacity_for(share) for share in shares]
    assert all(
        share * captured.MARGIN <= capacity or capacity == 1.0
        for share, capacity in zip(shares, capacities, strict=True)
    )
    most = [max(share * captured.MARGIN * captured.GRID * 1.0001, captured.SMALLEST * 1.2) for share in shares]
    assert all(capacity <= bound for capacity, bound in zip(capacities, most, strict=True))
    assert capacities == sorted(capacities)
    assert len(set(capacities)) <= 18

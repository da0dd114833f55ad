"""The optimiser of a recipe, and its learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sma_models.training.recipe import OptimiserConfig


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """Learning rate of one optimiser step.

    Linear from ``lr / warmup`` to ``lr`` over ``warmup`` steps, then ``lr * (share of the rest that is left) **
    power``.

    Args:
        config: the peak, the warm-up and the power.
        step: steps done before this one, from 0.
        steps: steps in all.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    left = max(steps - step, 0) / max(steps - config.warmup, 1)
    return float(config.lr * left**config.power)


def build_optimiser(config: OptimiserConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser over all parameters, as one group.

    On a CUDA device its learning rate is a tensor there, so that a captured step can follow it.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    betas, eps, decay, cuda = config.betas, config.eps, config.weight_decay, trained[0].is_cuda
    lr = torch.tensor(config.lr, device=trained[0].device) if cuda else config.lr
    if config.algorithm == "radam":
        return torch.optim.RAdam(
            trained, lr=lr, betas=betas, eps=eps, weight_decay=decay, decoupled_weight_decay=True, capturable=cuda
        )
    cls = torch.optim.AdamW if config.algorithm == "adamw" else torch.optim.Adam
    # One kernel for all: on a small model a tenth of the step is the optimiser otherwise.
    return cls(trained, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True, capturable=cuda)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, without synchronising with the device."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

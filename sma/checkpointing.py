"""Activation checkpointing that keeps the routing: a decision is saved, never taken a second time.

Recomputing a decision can flip it (a different kernel, noise), and then the recomputed activations have other shapes
than the saved gradients. :func:`checkpoint` saves the few bits of every decision and recomputes everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint


@torch.library.custom_op("sma::decision", mutates_args=())
def mark_decision(active: Tensor) -> Tensor:
    """The identity on a decision; its place in the graph is what :func:`checkpoint` saves."""
    return active.clone()


@mark_decision.register_fake
def _(active: Tensor) -> Tensor:
    return torch.empty_like(active)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.sma.decision.default else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``function`` now and again in the backward pass, but with the routing decisions of now.

    Args:
        function: any callable; sparsely activated layers may lie anywhere inside.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        What ``function`` returns.

    Example:
        >>> y = checkpoint(layer, x).output                       # doctest: +SKIP
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)

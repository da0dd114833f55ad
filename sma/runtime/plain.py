"""Is a child nothing but its weights? Only then may a fused operation read them and leave the child uncalled."""

from __future__ import annotations

from torch import nn

from sma.runtime.onednn import Linear


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection is nothing but its weights: not replaced, not parametrised, watched by no hook."""
    return type(linear) in (nn.Linear, Linear) and not (
        linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    )

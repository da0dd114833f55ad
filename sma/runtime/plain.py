"""Is a part plain? Only then may its caller do the work of the part without calling it.

Hooks, adapters, pruning, parametrisations, quantised weights, ``fully_shard``, ``torch.compile`` and
``checkpoint_wrapper`` all act when a module is called. A fused operation reads the weights of a module instead. So it
asks first, and where the answer is no, the module is called.
"""

from __future__ import annotations

from collections.abc import ValuesView
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from sma.dropout import Dropout
from sma.runtime.onednn import PLAIN_WEIGHTS, linear

LINEARS = frozenset({nn.Linear})
"""Projections whose weights may be read."""
DROPOUTS = frozenset({nn.Dropout, Dropout})
"""Dropouts whose probability may be read."""

_WEIGHTS = frozenset({*PLAIN_WEIGHTS, FakeTensor})  # a program that is exported has fake ones
_GLOBAL: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_GLOBAL_FORWARD, _GLOBAL_FORWARD_PRE, _GLOBAL_BACKWARD, _GLOBAL_BACKWARD_PRE = _GLOBAL
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where ``torch.compile``, ``checkpoint_wrapper`` and ``FullyShardedDataParallel`` keep what they wrap."""


def is_plain(part: nn.Module, kind: type | frozenset[type] = LINEARS) -> bool:
    """Whether calling a part would do nothing but run the ``forward`` of its class. Takes under a microsecond.

    Args:
        part: a child whose work its parent may do.
        kind: a base class that it must have (a mixer, a block), or the exact classes of which it must be one. With the
            default, projections, its weight must be a plain tensor as well.

    Returns:
        False for a part that was replaced or wrapped, that has hooks, an own or a compiled ``forward``, or, of a
        projection, a parametrised, pruned, sharded or quantised weight; and for every part while there are global
        module hooks.
    """
    if not (isinstance(part, kind) if isinstance(kind, type) else type(part) in kind):
        return False
    own = part.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or _GLOBAL_FORWARD
        or _GLOBAL_FORWARD_PRE
        or _GLOBAL_BACKWARD
        or _GLOBAL_BACKWARD_PRE
    ):
        return False
    return kind is not LINEARS or type(own["_parameters"].get("weight")) in _WEIGHTS


def why_called(part: nn.Module, kind: type | frozenset[type] = LINEARS) -> str | None:
    """Why a part has to be called, None where it is :func:`plain <is_plain>`."""
    if is_plain(part, kind):
        return None
    reason = _why_watched(part)
    if reason is not None:
        return reason
    if part.__dict__.get("_compiled_call_impl") is not None:
        return "is compiled"
    weight = part._parameters.get("weight")
    if isinstance(kind, frozenset) and type(part) in kind:
        return f"has a weight that is a {type(weight).__name__}"
    expected = kind.__name__ if isinstance(kind, type) else " or ".join(sorted({each.__name__ for each in kind}))
    return f"is of class {type(part).__name__}, not {expected}"


def _why_watched(part: nn.Module) -> str | None:
    own = part.__dict__
    if any(own.get(name) for name in _HOOKS):
        return "has hooks"
    if "forward" in own and unwrapped(part) is part:
        return "has a forward of its own"
    return "is watched by global module hooks" if any(_GLOBAL) else None


def watched_parts(model: nn.Module) -> dict[str, str]:
    """By the name of each part that runs Python code of others when it is called, the reason: "has hooks", say.

    A CUDA graph replays what was launched while it was captured, and would not run that code.
    """
    if any(_GLOBAL):
        return {"": "is watched by global module hooks"}
    found = ((name, _why_watched(part)) for name, part in model.named_modules())
    return {name: reason for name, reason in found if reason is not None}


def unwrapped(part: nn.Module) -> nn.Module:
    """The part inside the wrappers of PyTorch. Its class is that of the part; the wrapper has to be called."""
    while True:
        inside = next((part._modules[name] for name in _WRAPPED if part._modules.get(name) is not None), None)
        if inside is None:
            return part
        part = inside


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """``projection(x)``. A plain one runs as :func:`~sma.runtime.onednn.linear`, which is faster on some CPUs.

    Args:
        projection: an ``nn.Linear``, or the module that replaces it.
        x: ``(..., in_features)``.
    """
    if is_plain(projection):
        return linear(x, projection.weight, projection.bias)  # type: ignore[arg-type]
    out: Tensor = projection(x)
    return out


def call_router(router: nn.Module, x: Tensor) -> Tensor:
    """``router(x)`` with autocast disabled, in the dtype of its weight: rounding decides which tokens are active.

    Args:
        router: a projection that is not plain.
        x: ``(..., D)``.
    """
    if not torch.is_autocast_enabled(x.device.type):
        out: Tensor = router(x)
        return out
    weight = getattr(router, "weight", None)
    narrow = isinstance(weight, Tensor) and weight.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(x.device.type, enabled=False):
        out = router(x if narrow or x.dtype == torch.float64 else x.float())
    return out


class PartsWatch:
    """Notices that the parts of a model changed: replaced, wrapped, hooked, parametrised, or their weights replaced.

    A look takes about ten microseconds for a model of 14 layers, so that a decoder can afford one a step. Hooks that
    were removed, and new values in the same tensors, are not noticed; single numbers that were replaced are neither.

    Args:
        model: to be watched.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._owns = [part.__dict__ for part in modules]
        self._children = [part._modules.values() for part in modules if part._modules]
        self._weights: list[ValuesView[Tensor | None]] = [
            part._parameters.values()
            for part in modules
            if part._parameters and all(each is None or each.numel() > 1 for each in part._parameters.values())
        ]
        self._hooks = [*_GLOBAL, *(own[name] for own in self._owns for name in _HOOKS)]
        self._handles = RemovableHandle.next_id
        self._hooked = list(map(len, self._hooks))
        self._attributes = sum(map(len, self._owns))
        self._seen_children = list(chain.from_iterable(self._children))
        self._seen_weights = list(chain.from_iterable(self._weights))

    def changed(self) -> bool:
        """Whether something changed since this watch was made."""
        if self._handles != RemovableHandle.next_id:  # every hook that is registered, anywhere, takes a number
            handles = RemovableHandle.next_id
            if list(map(len, self._hooks)) != self._hooked:
                return True
            self._handles = handles
        if sum(map(len, self._owns)) != self._attributes:
            return True
        if list(chain.from_iterable(self._children)) != self._seen_children:
            return True
        try:  # what is the same object is not compared
            return list(chain.from_iterable(self._weights)) != self._seen_weights
        except (RuntimeError, TypeError, ValueError):
            return True

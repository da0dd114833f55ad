"""Whether derivatives are taken by something other than the backward pass of autograd.

``torch.func`` (``grad``, ``jvp``, ``hessian`` and others) and forward-mode differentiation cannot look into a gradient
that is written by hand. What they differentiate runs as PyTorch's own operations, which are slower and keep more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from sma.errors import BackendError


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active. Takes a tenth of a microsecond.

    A graph that is compiled knows neither.
    """
    if is_compiling():
        return False
    return transforms_active() or forward_ad._current_level >= 0


def refuse_vmap(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that ``torch.vmap`` maps over, where shapes follow from its values.

    Raises:
        BackendError: it does.
    """
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            raise BackendError(
                f"{name}: cannot run under torch.vmap, since each example would have another number of active tokens; "
                "call it with a batch (B, L, D) instead, or loop over the examples"
            )
        tensor = _functorch.get_unwrapped(tensor)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the ``backward`` of an operation that has no second derivative, which is refused where it is asked for.

    PyTorch's decorator of this name refuses it in ``Tensor.backward`` only; ``torch.autograd.grad`` leaves out the part
    that goes through the operation, and gives another number.

    Raises:
        BackendError: by the decorated function, under ``create_graph=True``.
    """
    operation = backward.__module__.split(".")[-2]

    @wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not is_compiling():
            raise BackendError(
                f"{operation}: this backend has no second derivative, and create_graph=True asks for one; take it by "
                "torch.func, jvp(grad(f), ...), or inside `with sma.ops.using('reference'):`"
            )
        return backward(ctx, *grads)

    return refusing

"""What the Triton backends share: when they apply, how a launch becomes a custom operator, seeds for their noise.

Triton itself is imported inside ``triton_kernel.py`` of an operation only, at the first use.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sma.ops.backend import Signature

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)


INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""True where kernels run in Triton's interpreter, on a CPU. It is for tests, and too slow for anything else."""
_capabilities: dict[int, tuple[int, int]] = {}


def why_not_triton(
    device: torch.device, *dtypes: torch.dtype | None, allowed: tuple[torch.dtype, ...] = FLOATS
) -> str | None:
    """Why kernels written in Triton cannot run, or None. They are for CUDA devices, and for Triton's interpreter.

    Args:
        device: of all tensors.
        *dtypes: of the tensors; None for one that is not given.
        allowed: the dtypes that the kernel supports.
    """
    if not INSTALLED:
        return "triton is not installed"
    if device.type != "cuda":
        if device.type != "cpu" or not INTERPRETING:
            return f"the kernel runs on CUDA devices, got {device.type}"
    elif INTERPRETING:
        return "TRITON_INTERPRET=1 keeps kernels off the device"
    elif torch.version.hip is None and capability(device.index or 0) < MINIMUM_CAPABILITY:
        have = ".".join(map(str, capability(device.index or 0)))
        return f"the kernel needs compute capability 8.0, the device has {have}"
    for dtype in dtypes:
        if dtype is not None and dtype not in allowed:
            return f"the kernel takes {', '.join(str(each).removeprefix('torch.') for each in allowed)}, got {dtype}"
    return None


def why_not_interpreted(signature: Signature) -> str | None:
    """Why kernels do not pay on a device unless they are forced, or None."""
    return "Triton's interpreter is for tests and has to be forced" if signature.device.type == "cpu" else None


def capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def kernel(
    name: str, *, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a custom operator ``sma::name`` of a function that launches kernels.

    The operator is what ``torch.compile`` and ``torch.export`` see. Called eagerly the function runs as it is, on the
    device of its first tensor: the dispatcher would take longer than many a kernel. A ``torch.autograd.Function``
    around it defines the gradient.

    Args:
        name: of the operator.
        fake: same signature; returns empty tensors of the right shapes and dtypes.
        mutates: names of arguments that are written to.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(inspect.unwrap(run), mutates_args=mutates)
        operator = torch.library.custom_op(f"sma::{name}", run, mutates_args=mutates, schema=schema)
        operator.register_fake(fake)

        @functools.wraps(run)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return operator(*args)
            first = next(each for each in args if isinstance(each, Tensor))
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    return run(*args)
            return run(*args)

        call.operator = operator  # type: ignore[attr-defined]
        return call

    return register


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own function takes a hundred times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def draw_seed(device: torch.device) -> Tensor:
    """``(1,)`` int64 for the noise of one call, from torch's generator of the device.

    Activation checkpointing therefore repeats it, and every replay of a CUDA graph draws another.
    """
    return torch.randint(0, 2**31 - 1, (1,), device=device)

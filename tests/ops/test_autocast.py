"""Under autocast every backend of an operation gives the same dtypes, whatever autocast does to PyTorch's functions.

The lists of functions that autocast runs in float32 differ: on a GPU sums, powers and exponentials are among them, on a
CPU they are not. Where there is no GPU, what it does to those that our operations use is imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sma.ops import using
from sma.ops.combine import combine
from sma.ops.compress import compress
from sma.ops.extract import extract
from sma.ops.narrow_linear import narrow_linear
from sma.ops.row_norm import RowNorm, row_norm
from sma.ops.segment_sum import segment_sum
from sma.routing import Packed
from sma_modules.ops.ema import ema
from sma_modules.ops.expert_matmul import expert_matmul
from sma_modules.ops.expert_order import combine as expert_combine
from sma_modules.ops.expert_order import dispatch, order_by_expert
from sma_modules.ops.expert_routing import choose_experts
from sma_modules.ops.feed_forward import activate
from sma_modules.ops.gau_inputs import gau_inputs
from sma_modules.ops.window_attention import window_attention
from tests.devices import DEVICE

NAMES = "sum prod cumsum cumprod norm softmax log_softmax logsumexp exp expm1 log log2 log10 log1p pow __pow__ rsqrt"
IN_FLOAT32 = {
    *(getattr(where, name) for name in NAMES.split() for where in (torch, Tensor, F) if hasattr(where, name)),
    F.layer_norm,
}


class _AsOnAGPU(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_widened(each) for each in args]
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


@contextmanager
def gpu_autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(DEVICE.type, dtype):
        if DEVICE.type == "cuda":
            yield
        else:
            with _AsOnAGPU():
                yield


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


PACKED = Packed.from_mask(torch.tensor([[True, False, True, True], [False, True, False, False]], device=DEVICE))
ORDER = order_by_expert(torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0]], device=DEVICE), 3)
CU = torch.tensor([0, 3, 4], device=DEVICE)
NORM = RowNorm(True, 1e-5, numbers(6), numbers(6))


def _attention(q: Tensor, window: int | None, bias: bool) -> Tensor:
    table = numbers(9) if bias else None
    position = torch.arange(4, device=DEVICE)
    kind: Any = "original" if bias else "none"
    return window_attention(
        q, q, q, q_cu=CU, k_cu=CU, causal=True, window=window, max_q=3, max_k=3, bias=kind, bias_table=table,
        q_position=position, k_position=position,
    )  # fmt: skip


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "combine": (lambda h: combine(h, PACKED, weight=numbers(2, 4), norm=NORM, activation="silu"), (4, 6)),
    "compress": (lambda x: compress(x, PACKED), (2, 4, 6)),
    "extract": (lambda h: extract(h, PACKED), (4, 6)),
    "narrow_linear": (lambda x: narrow_linear(x, numbers(2, 6), numbers(2)), (2, 4, 6)),
    "row_norm": (lambda x: row_norm(x, NORM), (4, 6)),
    "segment_sum": (lambda x: segment_sum(x, CU), (4, 6)),
    "ema": (lambda x: ema(x, *(numbers(6, 2, 1),) * 3, numbers(6, 2), numbers(6), bidirectional=False)[0], (2, 4, 6)),
    "expert_matmul": (lambda x: expert_matmul(x, numbers(3, 6, 5).to(x.dtype), ORDER.counts, ORDER.ends), (8, 6)),
    "dispatch": (lambda x: dispatch(x, ORDER), (4, 6)),
    "expert_combine": (lambda x: expert_combine(x, numbers(4, 2), ORDER), (8, 6)),
    "choose_experts": (lambda x: choose_experts(x.float(), 2, True), (4, 6)),
    "activate": (lambda x: activate(x, x, "silu"), (4, 6)),
    "gau_inputs": (lambda x: gau_inputs(x, numbers(2, 2), numbers(2, 2), position=CU[:1].expand(4)), (4, 6)),
    "window_attention": (lambda x: _attention(x, 2, True), (4, 1, 6)),
    "unbounded attention": (lambda x: _attention(x, None, False), (4, 1, 6)),
}


def dtypes(result: Any) -> list[torch.dtype]:
    return [each.dtype for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def test_what_is_imitated_changes_dtypes() -> None:
    x = numbers(3, 2).bfloat16()
    with gpu_autocast(torch.bfloat16):
        assert [x.sum(1).dtype, torch.exp(x).dtype, (x**2).dtype, (x + x).dtype] == [torch.float32] * 3 + [x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "reference"] + ["triton"] * (DEVICE.type == "cuda"))
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_no_dtype(name: str, backend: str, dtype: torch.dtype) -> None:
    run, shape = CASES[name]
    with using(backend):
        expected = dtypes(run(numbers(*shape).to(dtype)))
        with gpu_autocast(torch.bfloat16):
            assert dtypes(run(numbers(*shape).to(dtype))) == expected

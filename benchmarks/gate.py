"""The check before timing: small cases on the device, against the eager backend in float64.

In each precision the backends that would be chosen may be off by at most twice what the eager ones are off in the same
precision, at the worst element and on average, in the output and in every gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.subjects import Setting
from sma.ops import Op, using
from sma.ops.backend import Backend, Signature

ROUNDINGS = 4
"""Allowed beyond twice the eager error, in units of the dtype's precision: the eager error may be zero by luck."""
AGREEMENT = 0.995
"""Share of the decisions that must be the same in float32 as in float64; a token on the boundary may go either way."""


@dataclass(frozen=True)
class Case:
    """A small module and how to call it.

    Attributes:
        module: made on the CPU.
        x: its input on the CPU, floating point or not.
        call: ``(module, x, replay)`` to the output and the decision, to be replayed in the other runs, or None.
        autocast: low precision is mixed precision; otherwise module and input are cast.
        keep: parameters stay in float32 also when the input is not.
    """

    module: nn.Module
    x: Tensor
    call: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]
    autocast: bool = False
    keep: bool = False


def check(case: Case, setting: Setting) -> str | None:
    """The error in the results of a case, or None."""
    torch.manual_seed(0)
    # Weights and inputs that every precision can hold: what differs is the computation.
    exact_case = replace(case, module=case.module.to(setting.dtype), x=_cast(case.x, setting.dtype))
    exact, decision = _run(exact_case, setting, torch.float64, "eager", None)
    _, chosen = _run(exact_case, setting, torch.float32, None, None)
    agreement = _agreement(decision, chosen)
    if agreement < AGREEMENT:
        return f"{1 - agreement:.1%} of the decisions differ in float32"
    for dtype in dict.fromkeys((torch.float32, setting.dtype)):
        base, _ = _run(exact_case, setting, dtype, "eager", decision)
        mine, _ = _run(exact_case, setting, dtype, None, decision)
        # A gradient may be all cancellation; what it is made of is no smaller than a rounding of the largest one.
        gradients = [truth for name, truth in exact.items() if name != "output" and truth.numel()]
        scale = max((float(truth.abs().max()) for truth in gradients), default=0.0)
        for name, truth in exact.items():
            floor = 0.0 if name == "output" else torch.finfo(dtype).eps * scale
            wrong = _wrong(mine[name], base[name], truth, dtype, floor)
            if wrong:
                return f"{name} in {str(dtype).removeprefix('torch.')}: {wrong}"
    return None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _run(
    case: Case, setting: Setting, dtype: torch.dtype, backend: str | None, decision: Any
) -> tuple[dict[str, Tensor], Any]:
    """Output and gradients in float64, and the decision."""
    low = dtype not in (torch.float32, torch.float64)
    wide = torch.float32 if low and (case.autocast or case.keep) else dtype
    module = copy.deepcopy(case.module).to(setting.device, wide).train()
    x = _cast(case.x.to(setting.device), wide if case.autocast else dtype).detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    precision = torch.autocast(setting.device.type, dtype, enabled=low and case.autocast)
    with precision, nullcontext() if backend is None else using(backend):
        y, decided = case.call(module, x, decision)
        weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
        torch.autograd.backward((y.double() * weights).sum())
    results = {"output": y.detach().double()}
    named = [("input", x), *module.named_parameters()]
    results.update({f"gradient of {name}": t.grad.double() for name, t in named if t.grad is not None})
    return results, decided


def _agreement(decision: Any, other: Any) -> float:
    """Of the decisions of several layers, the smallest share of equal ones."""
    if not decision:
        return 1.0
    return min(float((decision[name].active == other[name].active).float().mean()) for name in decision)


def _wrong(mine: Tensor, base: Tensor, truth: Tensor, dtype: torch.dtype, floor: float) -> str | None:
    allowance = ROUNDINGS * torch.finfo(dtype).eps
    mine_error, base_error = (mine - truth).abs(), (base - truth).abs()
    for name, of in (("largest", torch.max), ("mean", torch.mean)):
        error, bound = of(mine_error), 2 * of(base_error) + allowance * of(truth.abs()) + floor
        if not bool(error <= bound):  # also for NaN
            return f"{name} error {float(error):.1e}, allowed {float(bound):.1e}"
    return None


@contextmanager
def recorded(used: dict[str, str]) -> Iterator[None]:
    """Note which backend each operation takes inside the ``with`` block."""
    call, run, chosen = Op.__call__, Op.run, Op.chosen

    def noting_call(op: Op, *args: Any, **kwargs: Any) -> Any:
        used[op.name] = op.choose(*args, **kwargs).name
        return call(op, *args, **kwargs)

    def noting_run(op: Op, signature: Signature, *args: Any, **kwargs: Any) -> Any:
        op.chosen(signature)
        return run(op, signature, *args, **kwargs)

    def noting_chosen(op: Op, signature: Signature) -> Backend:
        backend = chosen(op, signature)
        used[op.name] = backend.name
        return backend

    with (
        patch.object(Op, "__call__", noting_call),
        patch.object(Op, "run", noting_run),
        patch.object(Op, "chosen", noting_chosen),
    ):
        yield

"""The rows of the tables that are single modules, ours and the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import sma
from benchmarks import gate, peers
from benchmarks.rows import Row
from benchmarks.shares import Ours
from benchmarks.subjects import Setting, Subject, module_subject
from sma_modules.mixers.ema import EMA
from sma_modules.modules.ffn import FFN
from sma_modules.modules.moe import MoE


def capacity(share: float) -> float:
    """Capacity for a share of active tokens, which is settled to 2 % or 0.001 and stays, as nothing here is dropped."""
    return min(1.0, max(1.03 * share, share + 0.002))


def features(setting: Setting, d_model: int, dtype: torch.dtype | None = None) -> Tensor:
    """Random tokens ``(B, L, D)``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.length, d_model)
    return torch.randn(shape, generator=generator).to(setting.device, dtype or setting.dtype)


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)[0]
        return y


class Flat(nn.Module):
    """Tokens ``(B, L, D)`` through a module that takes ``(T, D)``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.module(x.flatten(0, 1))
        y: Tensor = out if isinstance(out, Tensor) else out.output
        return y.view_as(x)


def ema(causal: bool, dtype: torch.dtype | None, *, graph: bool = False) -> Row:
    """Our moving average; parameters in float32 whatever the input. ``graph`` captures it as one CUDA graph."""

    def build(setting: Setting) -> Subject:
        module = First(EMA.Config().build(d_model=setting.narrow(128), causal=causal)).to(setting.device)
        return module_subject(module, features(setting, setting.narrow(128), dtype), setting, graph=graph)

    def check(setting: Setting) -> gate.Case:
        module = First(EMA.Config().build(d_model=16, causal=causal))
        x = features(replace(setting, device=torch.device("cpu"), batch=2, length=300), 16)
        return gate.Case(module, x, lambda module, x, replay: (module(x), None), keep=True)

    of = "" if dtype is None else f", {str(dtype).removeprefix('torch.')}"
    return Row(f"ours{of}{', graph' if graph else ''}", build, check)


def published_ema(causal: bool) -> Row:
    """The published moving average, in float32 as it was written."""

    def build(setting: Setting) -> Subject:
        module = peers.PublishedEMA(peers.load_reference(setting.reference), setting.narrow(128), causal)
        return module_subject(module.to(setting.device), features(setting, setting.narrow(128), torch.float32), setting)

    return Row("published, float32", build)


def dense_ffn(d_model: int, hidden: int, *, graph: bool = False) -> Row:
    """The feed-forward network on every token; ``graph`` captures it as one CUDA graph."""

    def build(setting: Setting) -> Subject:
        width, inner = setting.narrow(d_model), setting.narrow(hidden)
        module = FFN.Config(d_hidden=inner).build(d_model=width).to(setting.device, setting.dtype)
        return module_subject(module, features(setting, width), setting, graph=graph)

    return Row("dense, graph" if graph else "dense", build)


def sparse_ffn(d_model: int, hidden: int, share: float, *, graph: bool = False) -> Row:
    """The feed-forward network on the tokens that activate it, router and all.

    ``graph`` fixes its capacity and captures it as one CUDA graph.
    """

    def layer(width: int, inner: int, capacity: float) -> sma.SparselyActivated:
        made = sma.SparselyActivated(FFN.Config(d_hidden=inner).build(d_model=width))
        return made.with_capacity(capacity if graph else None)

    def build(setting: Setting) -> Subject:
        width = setting.narrow(d_model)
        ours = Ours(layer(width, setting.narrow(hidden), capacity(share)), share).to(setting.device, setting.dtype)
        return module_subject(ours, features(setting, width), setting, ours.settle, graph=graph)

    def check(setting: Setting) -> gate.Case:
        x = features(replace(setting, device=torch.device("cpu"), batch=2, length=150), 64)
        return gate.Case(layer(64, 128, 1.0), x, _call_layer)

    return Row(f"ours r={share:g}, graph" if graph else f"ours r={share:g}", build, check)


def _call_layer(module: nn.Module, x: Tensor, replay: Any) -> tuple[Tensor, Any]:
    out = module(x, replay=replay["layer"] if replay else None)
    return out.output, {"layer": out.routing.detach()}


def experts(
    label: str, make: Callable[[int, int, int, int], nn.Module], *, ours: bool = False, graph: bool = False
) -> Row:
    """A mixture of 8 gated experts of which 2 take each token; ``graph`` captures it as one CUDA graph."""

    def build(setting: Setting) -> Subject:
        width = setting.narrow(1024)
        module = Flat(make(width, setting.narrow(2048), 8, 2)).to(setting.device, setting.dtype)
        return module_subject(module, features(setting, width), setting, graph=graph)

    def check(setting: Setting) -> gate.Case:
        x = features(replace(setting, device=torch.device("cpu"), batch=1, length=200), 64)
        return gate.Case(Flat(make(64, 128, 8, 2)), x, lambda module, x, replay: (module(x), None))

    return Row(f"{label}, graph" if graph else label, build, check if ours else None)


def mixture(d_model: int, hidden: int, n_experts: int, top_k: int) -> nn.Module:
    """Our mixture of experts."""
    moe: MoE = MoE.Config(d_hidden=hidden, n_experts=n_experts, top_k=top_k).build(d_model=d_model)
    return moe

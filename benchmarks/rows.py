"""The rows of the tables that are whole models, ours and the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import sma
from benchmarks import gate, peers
from benchmarks.shares import Ours
from benchmarks.subjects import LazyGraph, Setting, Subject, SyntheticTask, model_subject
from sma_models.inference.prefiller import Prefiller
from sma_models.language_model import LanguageModel

SLACK = 1.05
"""Capacity of the fixed-capacity rows over the share of active tokens: dropout moves decisions. Tokens dropped
for lack of capacity are reported.
"""
CHUNK = 8192
"""Tokens of one chunk of a prefill."""
FLASH = "Transformer, flash"
FLASH_GRAPH = "Transformer, flash, graph"
BYTES, LM = SyntheticTask(257, 2), SyntheticTask(256, 256, language=True)
GLA = {"hidden_size": 128, "num_heads": 4}
RETNET = {"hidden_size": 512, "num_heads": 8}


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        label: what the table calls it.
        build: makes it, warm-up aside.
        check: the small case that has to be right before it is timed; None for peers.
    """

    label: str
    build: Callable[[Setting], Subject]
    check: Callable[[Setting], gate.Case] | None = None


def task_of(config: Any) -> SyntheticTask:
    """The inputs and targets of a spec of ours."""
    if isinstance(config, LanguageModel.Config):
        return SyntheticTask(config.vocab_size, config.vocab_size, language=True)
    return SyntheticTask(config.vocab_size, config.n_classes)


def load(spec: str, setting: Setting, *overrides: str) -> Any:
    """The configuration of a spec, with no more layers than the setting allows."""
    full: Any = sma.load_spec(spec, *overrides)
    return sma.load_spec(spec, *overrides, f"n_layers={setting.depth(full.n_layers)}")


def model(label: str, spec: str, *overrides: str, share: float | None = None, graph: bool = False) -> Row:
    """A model of ours, with a share of its tokens active."""

    def build(setting: Setting) -> Subject:
        config = load(spec, setting, *overrides)
        ours = Ours(config.build(), share)
        return model_subject(ours, task_of(config), setting, ours.settle if share else None, graph=graph)

    return Row(label, build, lambda setting: model_case(spec, setting, *overrides))


def with_capacity(spec: str, share: float) -> Row:
    """As :func:`model`, with static shapes and the whole training step captured as one CUDA graph."""
    row = model(f"ours r={share:g}, graph", spec, _capacity(SLACK * share), share=share, graph=True)

    def build(setting: Setting) -> Subject:
        _require(spec, _capacity(SLACK * share))
        return row.build(setting)

    def check(setting: Setting) -> gate.Case:
        _require(spec, _capacity(1))  # holds everything that may be active in a model that is not settled
        return model_case(spec, setting, _capacity(1))

    return Row(row.label, build, check)


def _capacity(share: float) -> str:
    return f"blocks[0].activate.capacity={min(1.0, round(share, 4))}"


def _require(spec: str, override: str) -> None:
    try:
        sma.load_spec(spec, override)
    except sma.SMAError as error:
        raise RuntimeError(f"not available: {error}") from error


def model_case(spec: str, setting: Setting, *overrides: str) -> gate.Case:
    """The first layers of a spec on a small batch, without dropout."""
    still = ["dropout=0", "blocks[0].dropout=0", *overrides]
    if not isinstance(sma.load_spec(spec), LanguageModel.Config):
        still.append("head_dropout=0")
    config = sma.load_spec(spec, *still, "n_layers=1")
    inputs, _ = task_of(config).draw(replace(setting, batch=3, length=min(setting.length, 300)))

    def call(module: nn.Module, x: Tensor, replay: Any) -> tuple[Tensor, Any]:
        out = module(x, replay=replay or None)
        return out.logits, {name: routing.detach() for name, routing in out.routings.items()}

    return gate.Case(config.build(), inputs.cpu(), call, autocast=True)


def published(spec: str, share: float, *overrides: str) -> Row:
    """The published layers with the sizes of one of our specs."""

    def build(setting: Setting) -> Subject:
        module = peers.load_reference(setting.reference)
        config = load(spec, setting, *overrides)
        task = task_of(config)
        body = peers.Published(module, config, task, config.n_layers, setting.length, share)
        return model_subject(body, task, setting, body.settle)

    return Row(f"published r={share:g}", build)


def transformer(task: SyntheticTask, layers: int, d_model: int, heads: int, hidden: int, *, graph: bool = False) -> Row:
    """The Transformer with fused attention."""

    def build(setting: Setting) -> Subject:
        body = peers.transformer(task, setting.depth(layers), d_model, heads, hidden)
        return model_subject(body, task, setting, graph=graph)

    return Row(FLASH_GRAPH if graph else FLASH, build)


def linear_attention(kind: str, task: SyntheticTask, layers: int, *, graph: bool = False, **options: Any) -> Row:
    """A model of flash-linear-attention."""

    def build(setting: Setting) -> Subject:
        body = peers.linear_attention(kind, task, num_hidden_layers=setting.depth(layers), **options)
        return model_subject(body, task, setting, graph=graph)

    return Row(f"{kind} (fla), graph" if graph else f"{kind} (fla)", build)


def prefill(label: str, make: Callable[[Setting], nn.Module], *, graph: bool = False, chunk: int | None = None) -> Row:
    """The forward pass of a language model over a long context.

    Args:
        label: what the table calls it.
        make: the model; an :class:`~benchmarks.shares.Ours` settles its share of active tokens on the first chunk.
        graph: capture the pass as one CUDA graph.
        chunk: tokens at a time, with a state, as a :class:`~sma_models.inference.prefiller.Prefiller` does, which
            only ours can do; None for all at once.
    """

    def build(setting: Setting) -> Subject:
        if graph and setting.device.type != "cuda":
            raise RuntimeError("not available: CUDA graphs need a CUDA device")
        module = make(setting).to(setting.device).eval()
        ours = module if isinstance(module, Ours) else None
        tokens, _ = LM.draw(setting)

        @torch.no_grad()
        def beginning() -> None:
            with setting.autocast():
                module(tokens[:, :CHUNK])

        @torch.no_grad()
        def forward() -> None:
            with setting.autocast():
                module(tokens)

        settle = None if ours is None else lambda: ours.settle(beginning)
        share = settle() if settle is not None else None
        if chunk is None or ours is None:
            return Subject(module, LazyGraph(forward) if graph else forward, settle=settle, share=share)
        model: Any = ours.model.to(setting.dtype)
        prefiller = Prefiller(model, chunk)
        return Subject(model, lambda: prefiller.prefill(tokens) and None, share=share)

    is_ours = label.startswith("ours")
    return Row(label, build, (lambda setting: model_case("seqboat_lm", setting)) if is_ours else None)


def prefills(length: int) -> tuple[Row, ...]:
    """Our language model and its peers over a context of ``length`` tokens."""
    share = 0.3

    def ours(*overrides: str) -> Callable[[Setting], nn.Module]:
        return lambda setting: Ours(load("seqboat_lm", setting, *overrides).build(), share)

    def flash(setting: Setting) -> nn.Module:
        return peers.transformer(LM, setting.depth(12), 512, 8, 2048)

    def retnet(setting: Setting) -> nn.Module:
        return peers.linear_attention("RetNet", LM, num_hidden_layers=setting.depth(12), **RETNET)

    chunked = [prefill(f"ours r={share:g}, chunks of {CHUNK:,}, graph", ours(), chunk=CHUNK)]
    return (
        prefill(f"ours r={share:g}, graph", ours(_capacity(SLACK * share)), graph=True),
        prefill(f"ours r={share:g}", ours()),
        *(chunked if length > CHUNK else []),
        prefill(FLASH_GRAPH, flash, graph=True),
        prefill(FLASH, flash),
        prefill("RetNet (fla), graph", retnet, graph=True),
        prefill("RetNet (fla)", retnet),
    )

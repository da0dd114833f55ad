"""One token of every sequence after a long context: ours in a decoder, the others with their own caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.rows import CHUNK, GLA, LM, RETNET, Row, load, model_case
from benchmarks.shares import Ours
from benchmarks.subjects import Setting, Subject, capture
from sma_models.inference import Decoder, prefill
from sma_models.language_model import LanguageModel

SPEC, SHARE = "seqboat_lm", 0.3
TAPE = 64
"""Tokens that are fed in turn: with one token only, all decisions would be the same."""
TOLERANCE = 1e-3
"""How far the logits of steps may be from those of the whole sequence, in float32, before they are not timed."""


def rows() -> tuple[Row, ...]:
    """Everything that decodes."""
    llama = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    return (
        ours(f"ours r={SHARE:g}, graph"),
        ours(f"ours r={SHARE:g}", captured=False),
        static_llama("Llama, static cache, graph", True, **llama),
        static_llama("Llama, static cache", False, **llama),
        recurrent("RetNet", 12, **RETNET),
        recurrent("GLA", 12, **GLA | {"hidden_size": 512}),
    )


def ours(label: str, captured: bool = True) -> Row:
    """The language model in a :class:`~sma_models.inference.Decoder`."""

    def build(setting: Setting) -> Subject:
        if captured and setting.device.type != "cuda":
            raise RuntimeError("not available: CUDA graphs need a CUDA device")
        check_steps(setting)
        body: Any = load(SPEC, setting).build()
        model: LanguageModel = body.to(setting.device).eval()
        tokens, _ = LM.draw(replace(setting, batch=1))
        settled = Ours(model, SHARE)

        @torch.no_grad()
        def beginning() -> None:
            settled(tokens[:, :CHUNK])

        settled.settle(beginning)
        model.to(setting.dtype)
        # All sequences have the same past, which costs a step no less than different ones.
        state = prefill(model, tokens, chunk=CHUNK).state
        decoder = Decoder(model, setting.batch, capture=captured)
        decoder.resume(state.reorder(torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)))
        step = _fed(setting, decoder.step)
        return Subject(model, step, share=_share(decoder, step))

    return Row(label, build, lambda setting: model_case(SPEC, setting))


def check_steps(setting: Setting) -> None:
    """Check that steps give the logits of the whole sequence, on this device.

    Raises:
        RuntimeError: they do not.
    """
    config = load(SPEC, setting, "blocks[0].activate.module.window=32")
    body: Any = replace(config, n_layers=1).build()
    model: LanguageModel = body.to(setting.device).eval()
    tokens, _ = LM.draw(setting.of(2, 80))
    decoder = Decoder(model, 2)
    decoder.join_all(tokens[:, :60])
    with torch.no_grad():
        whole = model(tokens).logits
    for t in range(60, 80):
        error = float((decoder.step(tokens[:, t]) - whole[:, t]).abs().max())
        if not error <= TOLERANCE:
            raise RuntimeError(f"not timed, its results are wrong: steps are {error:.1e} off, allowed {TOLERANCE:.0e}")


def _fed(setting: Setting, step: Callable[[Tensor], Any]) -> Callable[[], None]:
    """``step`` with another token of the tape each time."""
    generator = torch.Generator().manual_seed(1)
    tape = torch.randint(0, 256, (TAPE, setting.batch), generator=generator).to(setting.device)
    at = 0

    def run() -> None:
        nonlocal at
        step(tape[at % TAPE])
        at += 1

    return run


def _share(decoder: Decoder, step: Callable[[], None]) -> float:
    """The mean share of active slots over the tape."""
    found = []
    for _ in range(TAPE):
        step()
        found += [decision.active.float().mean() for decision in decoder.decisions.values()]
    return float(torch.stack(found).mean())


def static_llama(label: str, graph: bool, **sizes: int) -> Row:
    """Hugging Face's Llama with a cache of fixed size, filled at random up to the context."""

    def build(setting: Setting) -> Subject:
        if graph and setting.device.type != "cuda":
            raise RuntimeError("not available: CUDA graphs need a CUDA device")
        built = peers.llama(setting.depth(12), setting.length + 1, **sizes)
        model = built.to(setting.device, setting.dtype).eval()
        cache = peers.optional("transformers").StaticCache(config=model.config, max_cache_len=setting.length + 1)
        token = torch.zeros(setting.batch, 1, dtype=torch.int64, device=setting.device)
        position = torch.full_like(token, setting.length)
        named = {_cache_argument(model): cache, "position_ids": position, "use_cache": True}

        @torch.no_grad()
        def forward() -> None:
            model(token, **named)
            # Back to the context, so that every step is the same.
            torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], 1)

        model_call = torch.no_grad()(lambda: model(token, **named))
        model_call()  # allocates the cache
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(setting.length)
        replay, peak = capture(forward) if graph else (forward, None)

        def step(tokens: Tensor) -> None:
            token.copy_(tokens[:, None])
            replay()

        return Subject(model, _fed(setting, step), peak=peak)

    return Row(label, build)


def _cache_argument(model: nn.Module) -> str:
    """What a model of transformers calls its cache."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in ("past_key_values", "cache") if name in known)


def recurrent(kind: str, layers: int, **sizes: Any) -> Row:
    """A model of flash-linear-attention with its recurrent state, after as much context as is read at once."""

    def build(setting: Setting) -> Subject:
        models = peers.optional("fla.models")
        config = getattr(models, f"{kind}Config")(vocab_size=256, num_hidden_layers=setting.depth(layers), **sizes)
        model = getattr(models, f"{kind}ForCausalLM")(config).to(setting.device, setting.dtype).eval()
        tokens, _ = LM.draw(setting.of(setting.batch, min(setting.length, CHUNK)))
        with torch.no_grad():
            cache = model(tokens, use_cache=True).past_key_values

        @torch.no_grad()
        def step(tokens: Tensor) -> None:
            model(tokens[:, None], past_key_values=cache, use_cache=True)

        return Subject(model, _fed(setting, step))

    return Row(f"{kind} (fla)", build)

"""One long stream: the time to prefill and to decode, and the size of the state, at points along it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding import SHARE, SPEC, check_steps
from benchmarks.rows import CHUNK, LM, load
from benchmarks.shares import Ours
from benchmarks.subjects import Setting
from benchmarks.tables import STREAM_HEAD, stream_cells, text_table
from benchmarks.timing import Clock
from sma_models.inference import Decoder
from sma_models.language_model import LanguageModel

TOKENS = 10_000_000
POINTS_A_DECADE = 3
STEPS = 64
"""Tokens decoded at a point in every round."""


def points(tokens: int, chunk: int) -> list[int]:
    """Where to stop: whole chunks, evenly spread over the decades, the last after all tokens."""
    found, at = [], float(chunk)
    while at < tokens:
        found.append(round(at / chunk) * chunk)
        at *= 10 ** (1 / POINTS_A_DECADE)
    return list(dict.fromkeys([*found, -(-tokens // chunk) * chunk]))


def stream(setting: Setting, tokens: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Prefill random tokens in chunks, and decode some tokens at points along them.

    Args:
        setting: device and dtype; a bound on its layers makes it small.
        tokens: to prefill.
        rounds: how often the decoding of a point is timed.
        clock: tells the time.

    Returns:
        For the results: what it is, and for each point how many tokens were read, milliseconds for a thousand tokens
        read since the point before, milliseconds of a decoding step in every round, MiB of the state, and MiB
        allocated on the device.

    Raises:
        RuntimeError: the logits of decoder steps differ from those of the whole sequence.
    """
    check_steps(setting)
    chunk = min(CHUNK, max(tokens // 8, 1))
    model = _settled(setting, chunk)
    generator = torch.Generator(device=setting.device).manual_seed(0)

    def drawn(length: int) -> Tensor:
        return torch.randint(256, (1, length), generator=generator, device=setting.device)

    decoder = Decoder(model, 1, prefill_chunk=chunk)
    slot = decoder.acquire()
    read, measured = 0, []
    state = decoder.prefiller.prefill(drawn(3 * chunk)).state  # warm; the third chunk is captured
    for point in points(tokens, chunk):
        start, before = clock.now(), read
        while read < point:
            state = decoder.prefiller.prefill(drawn(chunk), state).state
            read += chunk
        reading = 1e6 * (clock.now() - start) / (read - before)
        decoder.write(slot, state)
        tape, times = drawn(STEPS)[0], []
        for _ in range(rounds + 1):  # the first captures the step
            start = clock.now()
            for token in tape:
                decoder.step(token[None])
            times.append(1e3 * (clock.now() - start) / STEPS)
        on_gpu = setting.device.type == "cuda"
        measured.append(
            {
                "tokens": read,
                "read_ms": reading,
                "step_ms": times[1:],
                "state_mib": state.nbytes / 2**20,
                "allocated_mib": torch.cuda.memory_allocated() / 2**20 if on_gpu else None,
            }
        )
    how = {True: "captured as a graph", False: "launched from Python"}
    title = (
        f"One stream of {read:,} random bytes, {SPEC} at r={SHARE:g}, chunks of {chunk:,} "
        f"{how[decoder.prefiller.captured]}, steps {how[decoder.captured]}"
    )
    return {"stream": SPEC, "title": title, "points": measured}


def _settled(setting: Setting, chunk: int) -> LanguageModel:
    """The language model with its share of active tokens."""
    body: Any = load(SPEC, setting).build()
    model: LanguageModel = body.to(setting.device).eval()
    tokens, _ = LM.draw(replace(setting, batch=1, length=chunk))
    ours = Ours(model, SHARE)

    @torch.no_grad()
    def beginning() -> None:
        ours(tokens)

    ours.settle(beginning)
    return model.to(setting.dtype)


def show(result: dict[str, Any]) -> str:
    """A table for the terminal."""
    return "\n".join(["", result["title"], text_table(STREAM_HEAD, stream_cells(result))])

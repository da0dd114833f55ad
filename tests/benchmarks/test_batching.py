"""The peer of the server's benchmark writes what its model says, or is not timed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from benchmarks.batching import TORCH_FLASH, BatchingSetting, batching

SETTING = BatchingSetting((2, 32, 2, 48), torch.device("cpu"), torch.float32, slots=3, step=64, longest=160)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """PyTorch's flash attention, which only GPUs have, sequence by sequence; the mask is aligned at the end or not."""

    def attend(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, *longest: int, **how: Any) -> Tensor:
        assert how["window_size"] == (-1, 0)
        out = torch.zeros_like(q)
        for (a, b), (c, d) in zip(q_ends.unfold(0, 2, 1).tolist(), k_ends.unfold(0, 2, 1).tolist(), strict=True):
            assert b - a <= longest[0]
            assert d - c <= longest[1]
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a) if request.param else 0)
            rows = (q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1))
            attended = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=seen, scale=how["scale"])
            out[a:b] = attended.transpose(0, 1)
        return out

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend)


def written(attention: str) -> tuple[str, list[list[int]]]:
    torch.manual_seed(1)
    prompts = [list(range(first, first + 50)) for first in range(5)]

    async def write(peer: Any) -> list[list[int]]:
        return [tokens for _, tokens in await asyncio.gather(*(peer.write(prompt, 9) for prompt in prompts))]

    with batching(SETTING, attention) as peer:
        return peer.about["attention"], asyncio.run(write(peer))


@pytest.mark.parametrize("varlen", [True], indirect=True)
@pytest.mark.usefixtures("varlen")
def test_flash_attention_writes_the_same() -> None:
    flash, by_flash = written("flash")
    sdpa, by_sdpa = written("sdpa")
    assert (flash, sdpa) == (TORCH_FLASH, "sdpa")
    assert by_flash == by_sdpa
    assert [len(tokens) for tokens in by_sdpa] == [9] * 5


@pytest.mark.parametrize("varlen", [False], indirect=True)
@pytest.mark.usefixtures("varlen")
def test_wrong_texts_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="not timed, its results are wrong: a token is"):
        written("flash")

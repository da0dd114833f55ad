"""The packed view: its properties agree with the mask."""

from __future__ import annotations

import torch

from sma.routing import Packed


def test_packed_views_agree() -> None:
    mask = torch.tensor([[False, True, True, False], [False] * 4, [True, False, True, True]])
    packed = Packed.from_mask(mask, torch.arange(12).view(3, 4) + 100)
    assert packed.index.tolist() == [1, 2, 8, 10, 11]
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packed.lengths.tolist() == [2, 0, 3]
    assert packed.sequence.tolist() == [0, 0, 2, 2, 2]
    assert packed.rank.tolist() == [0, 1, 0, 1, 2]
    assert packed.position.tolist() == [101, 102, 108, 110, 111]
    assert (packed.max_length, packed.batch, packed.shape) == (3, 3, (3, 4))
    assert Packed.from_mask(mask).position.tolist() == [1, 2, 0, 2, 3]

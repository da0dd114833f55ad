"""How the eager backend cuts packed sequences into blocks of queries, each with one span of keys.

Both tilings use the same picture. Query rows go to a buffer of ``n_blocks`` blocks of ``block`` rows; key rows to a
buffer that is read in spans of ``span`` rows. Row t of a block and row s of its span are at distance ``s - left - t``
(key index minus query index), whatever the block: windows and local biases are one ``(block, span)`` matrix for all.

* whole: one block per sequence, its span holds all its keys. For unbounded attention, steps, and short sequences.
* strided: several blocks per sequence; spans overlap, and are a strided view of the buffer, not a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sma.ops.backend import concrete
from sma_modules.ops.window_attention.types import Layout, Rule


class Tiling(NamedTuple):
    """Where the rows of one head go. Heads follow one another, each with the same number of rows.

    Attributes:
        block: queries per block.
        span: keys per block.
        left: row of the span at the index of the block's first query.
        n_blocks: blocks per head.
        q_rows: ``(Q,)`` row of each query, in ``[0, n_blocks * block)``.
        k_rows: ``(K,)`` row of each key, in ``[0, n_blocks * stride + span - stride)``; -1 if no query can reach it.
        stride: rows from one span to the next.
        chunked: the blocks are the chunks.
        spare: rows at the end of the key buffer for keys that no query can reach, 0 or 1.
        q_sequence: ``(Q,)`` which sequence each query belongs to.
        k_sequence: ``(K,)`` the same for keys.
    """

    block: int
    span: int
    left: int
    n_blocks: int
    stride: int
    q_rows: Tensor
    k_rows: Tensor
    q_sequence: Tensor
    k_sequence: Tensor
    chunked: bool = False
    spare: int = 0

    def key_rows(self, heads: int) -> int:
        """Rows of a key buffer."""
        return heads * self.n_blocks * self.stride + self.span - self.stride + self.spare

    def of_heads(self, rows: Tensor, heads: int, rows_per_head: int) -> Tensor:
        """``(R * heads,)`` rows in a buffer of all heads, ordered as packed ``(R, heads)``; -1 is the spare row."""
        if heads > 1:
            offset = torch.arange(heads, device=rows.device) * rows_per_head
            spread = (rows[:, None] + offset).reshape(-1)
            rows = rows[:, None].expand(-1, heads).reshape(-1) if self.spare else rows
        else:
            spread = rows
        return torch.where(rows < 0, self.key_rows(heads) - 1, spread) if self.spare else spread


def spans(buffer: Tensor, n: int, span: int, stride: int) -> Tensor:
    """View of a contiguous buffer ``(rows, ...)`` as ``(n, span, ...)``: span i starts at row ``i * stride``."""
    return buffer.as_strided((n, span, *buffer.shape[1:]), (stride * buffer.stride(0), *buffer.stride()))


def overlap_add(weights: Tensor, x: Tensor, rows: int, stride: int) -> Tensor:
    """Transpose of products with :func:`spans`: ``weights^T @ x (n, span, f)``, summed into a buffer ``(rows, f)``.

    Args:
        weights: ``(n, block, span)``.
        x: ``(n, block, f)``.
        rows: of the buffer.
        stride: rows from one span to the next.
    """
    n, width = x.shape[0], x.shape[2]
    shares = -(-weights.shape[2] // stride)
    if shares == 1 and n * stride == rows:
        return torch.bmm(weights.transpose(1, 2), x).view(rows, width)
    # Added share by share: the products of all spans together would be several times as large as the buffer.
    total = x.new_zeros(max(n + shares, -(-rows // stride)), stride, width)
    for share in range(shares):
        part = weights[:, :, share * stride : (share + 1) * stride].transpose(1, 2)
        total[share : share + n, : part.shape[1]].baddbmm_(part, x)
    return total.view(-1, width)[:rows]


def _ranks(cu: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """``(rows,)`` sequence of every row, and its rank in that sequence."""
    sequence = torch.repeat_interleave(torch.arange(cu.numel() - 1, device=cu.device), cu.diff(), output_size=rows)
    return sequence, torch.arange(rows, device=cu.device) - cu[sequence]


def block_size(reach: int) -> int:
    """Queries per block for a window, from measurements on a CPU (see the README)."""
    return min(max(reach // 2, 16), 128)


def tile(n_queries: int, n_keys: int, layout: Layout, rule: Rule, finite: bool) -> Tiling:
    """The cheaper tiling, judged by the number of scores.

    Args:
        n_queries: Q.
        n_keys: K.
        layout: where the sequences lie.
        rule: which keys are visible.
        finite: no key or value is infinite or not a number, so that a span may hold rows of another sequence, with
            weight 0.
    """
    reach, batch, aligned = rule.reach, layout.q_cu.numel() - 1, layout.aligned
    max_q, max_k = max(min(layout.max_q, n_queries), 1), max(min(layout.max_k, n_keys), 1)
    queries = _ranks(layout.q_cu, n_queries)
    keys = queries if aligned else _ranks(layout.k_cu, n_keys)
    if reach is None:
        return _whole(layout, queries, keys, max_q, max_k)
    chunked = rule.chunk is not None and rule.chunk == reach + 1 and layout.k_start is None and aligned
    if chunked:
        block, left, right = reach + 1, 0, 0  # blocks are the chunks: no key outside the own block is visible
    else:
        block, left, right = block_size(reach), reach, 0 if rule.causal else reach
    gap = 0 if aligned and finite else -(-left // block)
    bound = (n_queries + batch * (block - 1)) // block + batch * gap
    if batch * max_q * max_k <= bound * block * (block + left + right):
        return _whole(layout, queries, keys, max_q, max_k)
    first, n_blocks = _first_rows(layout, block, gap, bound)
    (q_sequence, q_rank), (k_sequence, k_rank) = queries, keys
    q_rows = first[q_sequence] + q_rank
    if aligned:
        k_rows = q_rows + left
    else:
        index = k_rank - (layout.k_cu.diff() - layout.q_cu.diff())[k_sequence]
        k_rows = torch.where(index >= -left, first[k_sequence] + left + index, -1)
    return Tiling(
        block, block + left + right, left, n_blocks, block, q_rows, k_rows, q_sequence, k_sequence,
        chunked=chunked, spare=0 if aligned else 1,
    )  # fmt: skip


def _whole(
    layout: Layout, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], max_q: int, max_k: int
) -> Tiling:
    (q_sequence, q_rank), (k_sequence, k_rank), batch = queries, keys, layout.q_cu.numel() - 1
    if layout.aligned:
        longest = min(max_q, max_k)
        rows = q_sequence * longest + q_rank
        return Tiling(longest, longest, 0, batch, longest, rows, rows, q_sequence, q_sequence)
    # Sequences end together, so that distances are the same in all of them.
    q_rows = q_sequence * max_q + (max_q - layout.q_cu.diff())[q_sequence] + q_rank
    k_rows = k_sequence * max_k + (max_k - layout.k_cu.diff())[k_sequence] + k_rank
    return Tiling(max_q, max_k, max_k - max_q, batch, max_k, q_rows, k_rows, q_sequence, k_sequence)


def _first_rows(layout: Layout, block: int, gap: int, bound: int) -> tuple[Tensor, int]:
    """``(B,)`` row of the first query of each sequence, behind ``gap`` blocks for earlier keys; number of blocks."""
    blocks = (layout.q_cu.diff() + block - 1) // block + gap
    end = blocks.cumsum(0)
    return (end - blocks + gap) * block, int(end[-1]) if concrete(end) else bound

"""Stock sequence modules with a working memory: each output from the last activated inputs of its sequence only.

With a window of w, the output of an activated token is what the module gives at the end of the sequence of that token
and the w activated ones before it. So the last w inputs are all that a stream has to remember, whatever the module is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sma.errors import StreamingError
from sma.interfaces import ModuleOutput
from sma.routing import Packed
from sma.runtime.plain import unwrapped
from sma.state import State
from sma.working_memory import WorkingMemory
from sma.wrap.stock import call_module

BANDED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that look back once. Their window is a band in the mask of attention; others see each window apart."""


def call_windowed(module: nn.Module, h: Tensor, packed: Packed, state: State | None, window: int) -> ModuleOutput:
    """Run a causal module of layout "padded" on active tokens ``h (K, D)``, each with a window of its own.

    Args:
        module: a stock module, a chain of such, or a user's own.
        h: the tokens.
        packed: where they come from.
        state: a :class:`~sma.working_memory.WorkingMemory` of the ``window`` inputs before them, or None.
        window: how many activated inputs before the own one are seen.

    Raises:
        StreamingError: the state is no such memory.
    """
    rows, first, bounds, after = h, packed.cu_seqlens[packed.sequence], packed.cu_seqlens, None
    at = torch.arange(h.shape[0], device=h.device)
    if state is not None:
        if not isinstance(state, WorkingMemory) or state.capacity != window:
            held = f"one of {state.capacity}" if isinstance(state, WorkingMemory) else type(state).__name__
            raise StreamingError(f"{type(module).__name__}: needs a WorkingMemory of {window} tokens, got {held}")
        (rows,), bounds, _, after = state.append(packed, h)
        first = bounds[packed.sequence]
        at = bounds[1:][packed.sequence] - packed.lengths[packed.sequence] + packed.rank
    if isinstance(unwrapped(module), BANDED):
        whole = call_module(module, "padded", rows, _rows_of(bounds), None, True, window=window)
        return ModuleOutput(whole.output.index_select(0, at), after, whole.losses)
    lengths = (at - first + 1).clamp(max=window + 1)
    ends = lengths.cumsum(0)
    windows = _rows_of(torch.cat([ends.new_zeros(1), ends]))
    source = (at - lengths + 1)[windows.sequence] + windows.rank
    result = call_module(module, "padded", rows.index_select(0, source), windows, None, True)
    return ModuleOutput(result.output.index_select(0, ends - 1), after, result.losses)


def _rows_of(bounds: Tensor) -> Packed:
    """Sequences whose tokens are all active; the b-th owns rows ``bounds[b]:bounds[b + 1]``."""
    lengths = bounds.diff()
    length = int(lengths.max()) if lengths.numel() else 0
    return Packed.from_mask(torch.arange(length, device=bounds.device) < lengths[:, None])

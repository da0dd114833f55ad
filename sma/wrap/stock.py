"""How a module is called on the active tokens, whatever its layout.

A plain ``nn.Module`` is taken to work token by token. Stock sequence modules (attention, recurrent nets, convolutions,
pools) run on the ``padded`` layout: the active tokens of each sequence as one row ``(B', K', D)``, right-padded, rows
without active tokens left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sma.errors import ConfigError, ShapeError
from sma.interfaces import Layout, ModuleOutput
from sma.routing import Packed
from sma.runtime.plain import unwrapped, why_called
from sma.state import State
from sma.wrap.known import CHANNELS_FIRST, ROW_BY_ROW, stock_class
from sma.wrap.layouts import infer_layout, is_chain

MASK_ARGUMENTS = ("src_key_padding_mask", "key_padding_mask", "padding_mask")


def call_module(
    module: nn.Module,
    layout: Layout,
    h: Tensor,
    packed: Packed,
    state: State | None,
    causal: bool,
    window: int | None = None,
) -> ModuleOutput:
    """Run ``module`` on the active tokens ``h (K, D)``.

    A ``window`` is how far back a stock attention of layout "padded" may look, see :mod:`sma.wrap.windows`.

    Returns:
        Output ``(K, D')``, new state and auxiliary losses.

    Raises:
        ShapeError: the module did not return one row per token.
    """
    if layout == "padded":
        result = _call_padded(module, h, packed, causal, window)
    else:
        returned = module(h, packed, state) if layout == "packed" else module(h)
        result = ModuleOutput(returned) if isinstance(returned, Tensor) else _as_output(module, returned)
    if result.output.dim() != 2 or result.output.shape[0] != h.shape[0]:
        raise ShapeError(
            f"{type(module).__name__}: must return one row for each of {h.shape[0]} active tokens, "
            f"got {tuple(result.output.shape)}; a module that works on whole sequences needs layout='padded'"
        )
    return result


def _as_output(module: nn.Module, result: Any) -> ModuleOutput:
    if isinstance(result, tuple) and 1 <= len(result) <= 3:
        output = ModuleOutput(*result)
        stateful = output.state is None or isinstance(output.state, State)
        if isinstance(output.output, Tensor) and stateful and isinstance(output.losses, Mapping):
            return output
    raise ShapeError(
        f"{type(module).__name__}: must return a tensor, (tensor, sma.State or None) or a sma.ModuleOutput, "
        f"got {_describe(result)}; a module that returns something else needs a wrapper"
    )


def _describe(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(part).__name__ for part in result)})"
    return type(result).__name__


def _call_padded(module: nn.Module, h: Tensor, packed: Packed, causal: bool, window: int | None = None) -> ModuleOutput:
    if is_chain(unwrapped(module)):
        _check_chain(module)
        # Part by part, so that a part that works token by token (a batch norm, say) sees tokens and never padding.
        losses: dict[str, Tensor] = {}
        for i, child in enumerate(module.children()):
            h, _, more = call_module(child, infer_layout(child), h, packed, None, causal)
            losses.update({f"{i}.{name}": loss for name, loss in more.items()})
        return ModuleOutput(h, None, losses)
    lengths = packed.lengths
    rows = lengths.nonzero().squeeze(-1)
    if rows.numel() == 0:
        # One row of any one token keeps every parameter in the graph; nothing of it comes back. It is not zero, where a
        # norm may have no derivative.
        token = torch.linspace(-1, 1, h.shape[1], dtype=h.dtype, device=h.device) + h.sum()
        return ModuleOutput(_call_rows(module, token.view(1, 1, -1), lengths.new_ones(1), causal)[0, :0])
    width = packed.max_length
    row_of = torch.zeros_like(lengths).index_fill(0, rows, 1).cumsum(0) - 1
    flat = row_of[packed.sequence] * width + packed.rank
    padded = h.new_zeros(rows.numel() * width, h.shape[1]).index_copy(0, flat, h).view(rows.numel(), width, h.shape[1])
    out = _call_rows(module, padded, lengths[rows], causal, window)
    if out.dim() != 3 or out.shape[:2] != padded.shape[:2]:
        raise ShapeError(
            f"{type(module).__name__}: must keep (B, L) = {tuple(padded.shape[:2])}, got {tuple(out.shape)}"
        )
    return ModuleOutput(out.flatten(0, 1).index_select(0, flat))


def _check_chain(module: nn.Module) -> None:
    """Refuse a chain that has to be called: its parts are called one by one, on tokens or on padded rows.

    Raises:
        ConfigError: the chain has hooks or other attachments, or is wrapped.
    """
    reason = why_called(module, frozenset({type(unwrapped(module))}))
    if reason is not None:
        raise ConfigError(
            f"{type(unwrapped(module)).__name__}: layout 'padded' runs it part by part, so it must be plain, but it "
            f"{reason}; do the same to its parts instead"
        )


def _call_rows(module: nn.Module, x: Tensor, lengths: Tensor, causal: bool, window: int | None = None) -> Tensor:
    """Run on right-padded rows ``(B', K', D)`` of which none is empty."""
    mask = _causal_mask(x, window) if causal else None
    inner = unwrapped(module)
    for kind, call in _CALLS.items():
        if isinstance(inner, kind):
            return call(module, x, lengths, mask)
    if stock_class(inner) is not None:
        if isinstance(inner, CHANNELS_FIRST):
            return _channels_first(module, x, lengths, mask)
        if isinstance(inner, ROW_BY_ROW):
            return _row_by_row(module, x, lengths)
    return _custom(module, x, lengths)


def _padding_mask(x: Tensor, lengths: Tensor) -> Tensor | None:
    mask = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return mask if mask.any() else None


class _Mask(NamedTuple):
    """What a token must not look at, ``(K', K')``, and whether that is the future and nothing else."""

    hidden: Tensor
    only_future: bool


def _causal_mask(x: Tensor, window: int | None) -> _Mask:
    everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    if window is None or window >= x.shape[1]:
        return _Mask(everything.triu(1), True)
    return _Mask(everything.triu(1) | everything.tril(-window - 1), False)


def _attention(module: nn.Module, x: Tensor, lengths: Tensor, mask: _Mask | None) -> Tensor:
    batch_first = unwrapped(module).batch_first
    seq = x if batch_first else x.transpose(0, 1)
    out: Tensor = module(
        seq,
        seq,
        seq,
        key_padding_mask=_padding_mask(x, lengths),
        need_weights=False,
        attn_mask=mask and mask.hidden,
        is_causal=mask is not None and mask.only_future,
    )[0]
    return out if batch_first else out.transpose(0, 1)


def _encoder(module: nn.Module, x: Tensor, lengths: Tensor, mask: _Mask | None) -> Tensor:
    inner = unwrapped(module)
    layer = unwrapped(inner.layers[0]) if isinstance(inner, nn.TransformerEncoder) else inner
    batch_first = layer.self_attn.batch_first  # type: ignore[union-attr]
    seq = x if batch_first else x.transpose(0, 1)
    only_future = mask is not None and mask.only_future
    out: Tensor = module(
        seq, mask and mask.hidden, src_key_padding_mask=_padding_mask(x, lengths), is_causal=only_future
    )
    return out if batch_first else out.transpose(0, 1)


def _recurrent(module: nn.Module, x: Tensor, lengths: Tensor, mask: _Mask | None) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    out, _ = nn.utils.rnn.pad_packed_sequence(module(sequences)[0], batch_first=True, total_length=x.shape[1])
    return out


def _channels_first(module: nn.Module, x: Tensor, lengths: Tensor, mask: _Mask | None) -> Tensor:
    # Zero padding to the right is what the convolution itself would add at the end of each row.
    out: Tensor = module(x.transpose(1, 2))
    return out.transpose(1, 2)


def _row_by_row(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """One that would read padding: each row apart, as ``(1, D, L)``."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        # Norms refuse a single token in training. Twice the same token has the same mean and variance.
        twice = length == 1 and isinstance(unwrapped(module), (nn.InstanceNorm1d, nn.GroupNorm))
        tokens = x[row : row + 1, :length].transpose(1, 2)
        out: Tensor = module(tokens.expand(-1, -1, 2) if twice else tokens)
        rows.append(out[0, :, :length].t())
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _custom(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """A user's own sequence module: with a padding mask (True on padding) if it takes one, else row by row."""
    parameters = inspect.signature(unwrapped(module).forward).parameters
    name = next((name for name in MASK_ARGUMENTS if name in parameters), None)
    if name is not None:
        return _tensor(module, module(x, **{name: _padding_mask(x, lengths)}))
    rows = [_tensor(module, module(x[row : row + 1, :length]))[0] for row, length in enumerate(lengths.tolist())]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _tensor(module: nn.Module, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise ShapeError(
            f"{type(module).__name__}: must return a tensor (B, L, D), got {_describe(out)}; a wrapper can pick it out"
        )
    return out


_CALLS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor, _Mask | None], Tensor]] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder,
    nn.TransformerEncoder: _encoder,
    nn.RNNBase: _recurrent,
    nn.Conv1d: _channels_first,
}

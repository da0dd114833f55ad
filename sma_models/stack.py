"""Depth: a pattern of blocks, repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from sma.activated import ActivatedState
from sma.dropout import Dropout
from sma.errors import RoutingError, StreamingError
from sma.interfaces import Block, BlockOutput, Model, Norm
from sma.padding import Alignment, valid_of
from sma.routing import Routing
from sma.runtime.checkpointing import checkpoint
from sma.spec.sizes import check_repeated
from sma.state import State

_MANY_LAYERS = 1000
"""More layers are built only after a check that there is memory for them."""


@dataclass(kw_only=True, frozen=True)
class StackConfig(Model.Config):
    """The options of every model.

    Attributes:
        d_model: width.
        n_layers: number of blocks.
        blocks: the pattern over depth, repeated until there are ``n_layers``.
        final_norm: normalisation after the last block, or None.
        dropout: on the embedding.
        checkpoint: recompute each block in the backward pass instead of keeping its activations; routing decisions are
            kept.
    """

    d_model: int
    n_layers: int
    blocks: tuple[Block.Config, ...]
    final_norm: Norm.Config | None = None
    dropout: float = 0.0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        self.require(self.d_model >= 1, "d_model", "must be at least 1")
        self.require(self.n_layers >= 1, "n_layers", "must be at least 1")
        self.require(
            0 < len(self.blocks) <= self.n_layers, "blocks", f"must hold 1 to n_layers = {self.n_layers} blocks"
        )
        self.require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)")


@dataclass(frozen=True)
class StackState(State):
    """The state of each block."""

    layers: tuple[State | None, ...]


class HiddenStates:
    """The features between the blocks of one call of a model. The caller makes one for a call, which fills it.

    It is no list, as ``fully_shard`` and accelerate copy the lists that a part is called with.

    Attributes:
        tensors: ``(B, L, D)`` before every block and after the final norm, with zeros at padding.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


class Stack(nn.Module):
    """The blocks of a model, its final norm and the dropout of its embedding.

    Everything public that the models share is here: masks are aligned, routings and losses are gathered by the name of
    their layer.
    """

    def __init__(self, config: StackConfig, *, causal: bool) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.causal = causal
        self.checkpoint = config.checkpoint
        if config.n_layers > _MANY_LAYERS:
            with torch.device("meta"):
                once = [block.build(d_model=config.d_model, causal=causal) for block in config.blocks]
            check_repeated(once, config.n_layers // len(once), "n_layers")
        pattern = (config.blocks[i % len(config.blocks)] for i in range(config.n_layers))
        self.layers = nn.ModuleList(block.build(d_model=config.d_model, causal=causal) for block in pattern)
        self.final_norm = config.final_norm.build(d_model=config.d_model) if config.final_norm else None
        self.dropout = Dropout(config.dropout)

    def initial_state(self, batch: int, like: Tensor) -> StackState:
        """State before the first token.

        Raises:
            StreamingError: a block cannot stream; the message says why.
        """
        return StackState(tuple(layer.initial_state(batch, like) for layer in self.layers))  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
        hidden: HiddenStates | None = None,
    ) -> BlockOutput:
        """Run ``x (B, L, D)`` through the blocks.

        Args:
            x: embedded tokens.
            state: from :meth:`initial_state` or the previous chunk.
            valid: ``(B, L)`` bool, True on real tokens; padding may lie anywhere.
            lengths: ``(B,)`` int64, instead of ``valid`` where all padding is on the right; spares the search for it.
            replay: routings to take the decisions from, by name.
            hidden: is filled with the features between the blocks.

        Returns:
            Features ``(B, L, D)`` (padding holds zeros), state, and routings and losses named ``layers.<i>.<...>``, in
            the columns and on the device of ``x``; the state of a block is on the device of the block.

        Raises:
            ShapeError: ``valid`` or ``lengths`` do not fit ``x``.
            StreamingError: the state is of another model or batch.
            RoutingError: ``replay`` names a layer that does not decide, or is of another shape.
        """
        self._check(x, state, replay)
        alignment = Alignment.of(valid, (x.shape[0], x.shape[1]), lengths)
        lengths = alignment.lengths
        if torch.is_autocast_enabled(x.device.type):  # or every layer would read and write float32
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x, device = alignment.align(x), x.device
        x = self.dropout(x)  # this, and the blocks, may lie on other devices, to which hooks bring what they are given

        def restored(tensor: Tensor) -> Tensor:
            return alignment.restore(tensor.to(device))

        def unpadded(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device)
            if lengths is None:
                return tensor
            return alignment.restore(tensor.masked_fill(~valid_of(lengths, tensor)[..., None], 0.0))

        states: list[State | None] = []
        routings: dict[str, Routing] = {}
        losses: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            own = _replay_of(replay, f"layers.{i}.", alignment)
            arguments: dict[str, Any] = {"lengths": lengths, "replay": own}
            before = state.layers[i] if state else None
            if hidden is not None:
                hidden.tensors.append(unpadded(x))
            out = (
                checkpoint(layer, x, before, **arguments)
                if self.checkpoint and self.training
                else layer(x, before, **arguments)
            )
            x = out.x
            states.append(out.state)
            routings.update({f"layers.{i}.{name}": r.map(restored) for name, r in out.routings.items()})
            losses.update({f"layers.{i}.{name}": loss.to(device) for name, loss in out.losses.items()})
        for name in replay or {}:
            if name not in routings:
                raise RoutingError(f"replay: no layer {name!r} decides; there are {', '.join(routings) or 'none'}")
        if self.final_norm is not None:
            x = self.final_norm(x, lengths=lengths)
        x = unpadded(x)
        if hidden is not None:
            hidden.tensors.append(x)
        return BlockOutput(x, None if state is None else replace(state, layers=tuple(states)), routings, losses)

    def _check(self, x: Tensor, state: StackState | None, replay: Mapping[str, Routing] | None) -> None:
        if state is not None:
            if not isinstance(state, StackState) or len(state.layers) != len(self.layers):
                held = f"of {len(state.layers)} layers" if isinstance(state, StackState) else type(state).__name__
                raise StreamingError(f"state: must be of a model of {len(self.layers)} layers, got {held}")
            rows = {tensor.shape[0] for tensor in state.tensors()}
            if rows - {x.shape[0]}:
                raise StreamingError(f"state: must be of {x.shape[0]} sequences like the input, got {rows.pop()}")
        for name, routing in (replay or {}).items():
            if routing.active.shape[:2] != x.shape[:2]:
                raise RoutingError(
                    f"replay[{name!r}]: must be of (B, L) = {tuple(x.shape[:2])}, got {tuple(routing.active.shape[:2])}"
                )


def _replay_of(replay: Mapping[str, Routing] | None, prefix: str, alignment: Alignment) -> dict[str, Routing] | None:
    if replay is None:
        return None
    own = {name.removeprefix(prefix): routing for name, routing in replay.items() if name.startswith(prefix)}
    return {name: routing.map(alignment.align) for name, routing in own.items()}


def position_of(state: StackState, *, checked: bool = False) -> Tensor:
    """``(B,)`` int64: real tokens so far, as the layers that decide have counted them.

    Where no layer does, nothing depends on it, and it is zero.

    Args:
        state: of a model.
        checked: all layers are known to agree; otherwise they are compared, which synchronises with the device.

    Raises:
        StreamingError: the state holds nothing, or two layers disagree.
    """
    layers = (each.seen for each in _inside(state) if isinstance(each, ActivatedState))
    first = next(layers, None)
    if first is None:
        tensors = state.tensors()
        if not tensors:
            raise StreamingError("state: holds no tensor")
        return torch.zeros(tensors[0].shape[0], dtype=torch.int64, device=tensors[0].device)
    if checked or torch.compiler.is_compiling():
        return first
    seen = [first, *layers]
    if len(seen) == 1:
        return first
    same = all(each.shape == seen[0].shape for each in seen)
    # One synchronisation with the device for all layers.
    if not same or bool((torch.stack([each.to(seen[0].device) for each in seen]) != seen[0]).any()):
        raise StreamingError(
            f"state: every layer must have seen as many tokens, got {[each.tolist() for each in seen]}"
        )
    return seen[0]


def _inside(value: Any) -> Iterator[State]:
    """The states in a state, itself included."""
    if isinstance(value, State):
        yield value
        for field in fields(value):
            yield from _inside(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _inside(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _inside(item)

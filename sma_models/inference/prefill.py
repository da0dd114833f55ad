"""Reading prompts, in chunks, so that memory does not grow with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sma.errors import ConfigError, StreamingError
from sma.interfaces import BlockOutput
from sma.ops.backend import without_autocast
from sma.routing import Routing
from sma.state import State, misfit
from sma_models.inference.fixed_capacity import why_not_fixed, with_fixed_rows
from sma_models.inference.graphs import WARMUP, Graph, copy_all
from sma_models.language_model import LanguageModel
from sma_models.model_io import check_tokens, without_padding
from sma_models.stack import StackState

_MOST_TOKENS = 32_768
"""In a chunk with a row for every token: with more of them the device is busy, and inactive tokens cost time."""
_MOST_GRAPHS = 4
"""Whole chunks of further numbers of prompts are launched."""
_LEAST_COLUMNS = 128
"""Of a graph for less than a chunk; the next ones have four times as many, and the last a chunk."""


class Pass(NamedTuple):
    """What :meth:`Reader.read_pieces` reads at once: pieces of up to ``columns`` tokens, of up to ``rows`` prompts."""

    columns: int
    rows: int


class Piece(NamedTuple):
    """What :meth:`Reader.read_pieces` gives of a piece of a prompt.

    Attributes:
        x: ``(1, L, D)``, what the stack of the model gives; overwritten by the next call, as are the routings.
        state: after the piece.
        logits: ``(1, V)`` of the token after it.
        routings: of the layers by their names; none where they were not asked for.
    """

    x: Tensor
    state: StackState
    logits: Tensor
    routings: Mapping[str, Routing]


class Prefilled(NamedTuple):
    """What reading prompts gives: the state after them, and the logits ``(B, V)`` of each one's next token."""

    state: StackState
    logits: Tensor


def check_prompt(model: LanguageModel, prompt: Tensor, valid: Tensor | None, chunk: int) -> Tensor:
    """The prompts ``(B, L)`` with zeros at padding.

    Raises:
        ConfigError: the chunk is below 1, the prompt is empty or a row of it is all padding.
        ShapeError: the prompt or ``valid`` have the wrong shape or dtype, or a token is not in the vocabulary.
    """
    if chunk < 1:
        raise ConfigError(f"prefill_chunk: must be at least 1, got {chunk}")
    prompt = without_padding("prompt", prompt, valid, model.embedding.weight)
    check_tokens("prompt", prompt, model.vocab_size)
    if prompt.shape[1] == 0 or (valid is not None and not bool(valid.any(1).all())):
        raise ConfigError(f"prompt: every row needs at least one real token, got shape {tuple(prompt.shape)}")
    return prompt


class Reader:
    """Reads prompts through the parallel path, in chunks, so that memory does not grow with them.

    On a CUDA device the host takes far longer to launch a chunk than the device to compute it, as every layer waits to
    hear how many tokens are active. There chunks in which nothing is padding have a row for every token in every layer,
    whoever is active, and are captured as CUDA graphs, unless a part of the model says why not (:attr:`uncaptured`):
    whole ones, with a graph for each number of prompts that are read together, and what is left of a single prompt,
    filled up to one of a few lengths. The chunk alone decides how it is run, so that results never depend on what was
    read before. Chunks of more than 32,768 tokens keep the device busy, and have rows for the active tokens only.

    Args:
        model: that reads, in evaluation mode. Its weights are used where they lie, and may change in place.
        chunk: how many columns are read at once.
        capture: False never captures a graph, and has rows for the active tokens only.
        together: of how many single prompts :meth:`read_pieces` is to read a whole chunk at once. Of shorter pieces it
            then reads more: twice as many with a quarter of the columns, and so on.

    Attributes:
        together: the same; 1 where nothing is captured, or where the rows would be too many.
        passes: what it reads at once, the shortest pieces first.

    Raises:
        ConfigError: the chunk or ``together`` is below 1.
    """

    def __init__(self, model: LanguageModel, chunk: int = 2048, *, capture: bool = True, together: int = 1) -> None:
        for name, value in (("prefill_chunk", chunk), ("together", together)):
            if value < 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")
        self.model, self.chunk = model, chunk
        self._why_not = _why_uncaptured(model, capture)
        self.together = 1 if self._why_not or together * chunk > _MOST_TOKENS else together
        # A quarter of the columns, twice the rows: half the tokens, and not too many states to keep and to move.
        sizes = _sizes(chunk) if self.together > 1 else [chunk]
        self.passes = [Pass(columns, self.together * math.isqrt(chunk // columns)) for columns in sizes]
        self._fixed: LanguageModel | None = None
        self._beginning: StackState | None = None
        self._places: dict[int, StackState] = {}  # of the states that go in, by the number of prompts
        self._wholes: dict[int, _Captured] = {}
        self._parts: dict[int, _Captured] = {}
        self._several: dict[Pass, _CapturedPieces] = {}

    @property
    def uncaptured(self) -> dict[str, str]:
        """Why chunks are not captured, by the name of the part of the model that is in the way, ``""`` for the whole.

        Where a capture was tried and failed, what CUDA said is the reason.
        """
        failures = [graph.failure for graph in self._graphs() if graph.failure is not None]
        return self._why_not | ({"": failures[0]} if failures else {})

    @property
    def captured(self) -> bool:
        """Whether chunks are replayed from CUDA graphs."""
        return any(graph.ready for graph in self._graphs())

    def _graphs(self) -> list[Graph[Any]]:
        single = [each.graph for each in (*self._wholes.values(), *self._parts.values())]
        return [*single, *(each.graph for each in self._several.values())]

    def beginning(self) -> StackState:
        """The state before the first token of a single prompt, made once: states are values."""
        if self._beginning is None:
            self._beginning = self.model.initial_state(1)
        return self._beginning

    def warm_up(self) -> None:
        """Read single prompts of every length that has a graph, so that no later one waits for its capture.

        Of a reader of several ``together`` these are the graphs of its ``passes``.
        """
        if self._why_not:
            return
        parts = {min(size, self.chunk - 1) for size in _sizes(self.chunk)} - {0}
        for length in [each.columns for each in self.passes] if self.together > 1 else [*sorted(parts), self.chunk]:
            tokens = torch.zeros(1, length, dtype=torch.int64, device=self.model.embedding.weight.device)
            for _ in range(WARMUP + 1):
                self.read_pieces([tokens], [self.beginning()])

    @torch.no_grad()
    def read(self, prompt: Tensor, state: StackState | None = None, *, valid: Tensor | None = None) -> Prefilled:
        """Read prompts; arguments and errors as for :func:`prefill`."""
        prompt = check_prompt(self.model, prompt, valid, self.chunk)
        weight = self.model.embedding.weight
        if state is None:
            state = self.beginning() if prompt.shape[0] == 1 else self.model.initial_state(prompt.shape[0])
        last = torch.zeros(prompt.shape[0], self.model.stack.d_model, dtype=weight.dtype, device=prompt.device)
        for start in range(0, prompt.shape[1], self.chunk):
            columns = slice(start, start + self.chunk)
            mask = None if valid is None else valid[:, columns]
            out = self.read_chunk(prompt[:, columns], state, valid=mask)
            state, last = cast("StackState", out.state), _last(out.x, mask, last)
        return Prefilled(state, self.model.logits(last))

    @torch.no_grad()
    def read_chunk(self, tokens: Tensor, state: StackState, *, valid: Tensor | None = None) -> BlockOutput:
        """One chunk.

        Args:
            tokens: ``(B, L)``, L at most the chunk.
            state: to go on from.
            valid: ``(B, L)`` bool, True on real tokens.

        Returns:
            What the stack of the model gives. Features and routings are overwritten by the next chunk; the state is a
            value.
        """
        many = tokens.numel() > _MOST_TOKENS
        if self._why_not or many or (valid is not None and not bool(valid.all())):
            return self.model.stack(self.model.embed(tokens), state, valid=valid)  # type: ignore[no-any-return]
        fixed = self._with_fixed_rows()
        batch, length = tokens.shape
        if length < self.chunk:
            if batch > 1:
                return self.model.stack(self.model.embed(tokens), state)  # type: ignore[no-any-return]
            columns = next(size for size in _sizes(self.chunk) if size >= length)
            if columns not in self._parts:
                self._parts[columns] = _Captured(fixed, columns, self._place(batch), part=True)
            return self._parts[columns].run(tokens, state)
        if batch not in self._wholes and len(self._wholes) < _MOST_GRAPHS:
            self._wholes[batch] = _Captured(fixed, length, self._place(batch))
        if batch in self._wholes:
            return self._wholes[batch].run(tokens, state)
        return fixed.stack(fixed.embed(tokens), state)  # type: ignore[no-any-return]

    def pass_of(self, length: int) -> Pass:
        """In which a piece of so many tokens is read, at most the chunk: whatever the others are, and their number."""
        return next(each for each in self.passes if each.columns >= length)

    @torch.no_grad()
    def read_pieces(
        self, pieces: Sequence[Tensor], states: Sequence[StackState], *, routings: bool = True
    ) -> list[Piece]:
        """Pieces of several single prompts, those of a :meth:`pass <pass_of>` at once.

        A pass always has all its rows and columns, whoever comes, so that what one prompt gives does not depend on the
        others.

        Args:
            pieces: ``(1, L)`` each, L at most the chunk; of each pass at most its rows. All on one device, or on the
                CPU.
            states: to go on from.
            routings: whether they are wanted.

        Raises:
            ConfigError: there are more of them.
            StreamingError: a state is of another model, or of several sequences.
        """
        of_pass: dict[Pass, list[int]] = {}
        for i, piece in enumerate(pieces):
            of_pass.setdefault(self.pass_of(piece.shape[1]), []).append(i)
        for each, those in of_pass.items():
            if len(those) > each.rows:
                raise ConfigError(
                    f"pieces: must be at most {each.rows} of up to {each.columns} tokens, got {len(those)}"
                )
        if self.together == 1:
            return [self._read_piece(*each) for each in zip(pieces, states, strict=True)]
        found: dict[int, Piece] = {}
        for each, those in of_pass.items():
            if each not in self._several:
                place = _rows(self._place(self.passes[0].rows), each.rows)
                self._several[each] = _CapturedPieces(self._with_fixed_rows(), each, place)
            read = self._several[each].run([pieces[i] for i in those], [states[i] for i in those], routings=routings)
            found |= zip(those, read, strict=True)
        return [found[i] for i in range(len(pieces))]

    def _read_piece(self, piece: Tensor, state: StackState) -> Piece:
        out = self.read_chunk(piece.to(self.model.embedding.weight.device), state)
        logits = self.model.logits(out.x[:, -1])
        return Piece(out.x, cast("StackState", out.state), logits, out.routings)

    def _with_fixed_rows(self) -> LanguageModel:
        if self._fixed is None:
            self._fixed = with_fixed_rows(self.model)
        return self._fixed

    def _place(self, batch: int) -> StackState:
        if batch not in self._places:
            self._places[batch] = self.model.initial_state(batch)
        return self._places[batch]


def _sizes(chunk: int) -> list[int]:
    """How many columns the graphs for less than a chunk have."""
    size, sizes = _LEAST_COLUMNS, []
    while size < chunk:
        sizes.append(size)
        size *= 4
    return [*sizes, chunk]


def _why_uncaptured(model: LanguageModel, capture: bool) -> dict[str, str]:
    device = model.embedding.weight.device
    if not capture:
        return {"": "capture is False"}
    if device.type != "cuda":
        return {"": f"a CUDA graph needs a CUDA device, the model is on {device}"}
    if model.training:
        return {"": "the model is in training mode"}
    return why_not_fixed(model)


class _Place:
    """Where a chunk of some prompts, and the state that goes in, stay.

    Args:
        model: with a fixed number of rows.
        columns: of the chunk.
        state: where the state that goes in will lie.
        part: whether fewer columns may be filled.
    """

    def __init__(self, model: LanguageModel, columns: int, state: StackState, *, part: bool) -> None:
        self.model, self._state = model, state
        self.form, self.tensors = state.form(), state.tensors()
        device, batch = model.embedding.weight.device, self.tensors[0].shape[0]
        self.tokens = torch.zeros(batch, columns, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device) if part else None

    def tensors_of(self, state: StackState, batch: int) -> list[Tensor]:
        """The tensors of a state, in the order of :attr:`tensors`.

        Raises:
            StreamingError: it is of another model or batch.
        """
        tensors = state.tensors()
        if state.form() == self.form and all(each.shape[0] == batch for each in tensors):
            return tensors
        problem = misfit(self._state, state)
        if problem is not None:
            raise StreamingError(f"state: does not fit the model: {problem}")
        raise StreamingError(f"state: must be of {batch} sequences like the input, got {tensors[0].shape[0]}")

    def stack(self) -> BlockOutput:
        """What the stack of the model gives for what lies there."""
        with without_autocast(self.tokens.device):
            features = self.model.embed(self.tokens)
            return self.model.stack(features, self._state, lengths=self.lengths)  # type: ignore[no-any-return]


class _Captured:
    """A chunk of some prompts, or a part of one, as a CUDA graph; arguments as for the place."""

    def __init__(self, model: LanguageModel, columns: int, state: StackState, *, part: bool = False) -> None:
        self._place = _Place(model, columns, state, part=part)
        self.graph: Graph[BlockOutput] = Graph(self._place.tokens.device)

    def run(self, tokens: Tensor, state: StackState) -> BlockOutput:
        """What the stack gives; see :meth:`Reader.read_chunk`.

        Raises:
            StreamingError: the state is of another model or batch.
        """
        place, length = self._place, tokens.shape[1]
        before = place.tensors_of(state, place.tokens.shape[0])
        place.tokens[:, :length].copy_(tokens)  # behind them stand earlier ones, which nobody looks at
        if place.lengths is not None:
            place.lengths.fill_(length)
        copy_all(place.tensors, before)
        out = self.graph.run(place.stack)
        own = cast("StackState", out.state)
        (state,) = _values(own, [own.tensors()])
        if length == out.x.shape[1]:
            return out._replace(state=state)
        routings = {name: routing.map(lambda each: each[:, :length]) for name, routing in out.routings.items()}
        return out._replace(x=out.x[:, :length], state=state, routings=routings)


class _CapturedPieces:
    """A pass over pieces of single prompts, a row each, as a CUDA graph.

    What the host does for a piece counts: views are made once, and all rows are copied together.
    """

    def __init__(self, model: LanguageModel, size: Pass, state: StackState) -> None:
        self._place = _Place(model, size.columns, state, part=True)
        self._rows = [[each[row : row + 1] for each in self._place.tensors] for row in range(size.rows)]
        self._after: tuple[State | None, list[list[Tensor]]] = (None, [])
        self.graph: Graph[tuple[BlockOutput, Tensor]] = Graph(self._place.tokens.device)

    def run(self, pieces: Sequence[Tensor], states: Sequence[StackState], *, routings: bool) -> list[Piece]:
        """See :meth:`Reader.read_pieces`."""
        place, count = self._place, len(pieces)
        before = [place.tensors_of(state, 1) for state in states]
        assert place.lengths is not None
        lengths = [piece.shape[1] for piece in pieces]
        tokens = pad_sequence([piece[0] for piece in pieces], batch_first=True)
        place.tokens[:count, : tokens.shape[1]].copy_(tokens)
        place.lengths.copy_(torch.tensor([*lengths, *[0] * (len(self._rows) - count)]))
        copy_all(_joined(self._rows[:count]), _joined(before))
        out, logits = self.graph.run(self._forward)
        own = cast("StackState", out.state)
        if self._after[0] is not own:  # every replay gives the same tensors
            self._after = own, [[each[row : row + 1] for each in own.tensors()] for row in range(len(self._rows))]
        values, logits = _values(own, self._after[1][:count]), logits[:count].clone()
        found = []
        for row, (length, state) in enumerate(zip(lengths, values, strict=True)):
            known = out.routings.items() if routings else ()
            of_row = {name: routing.map(_cut(row, length)) for name, routing in known}
            found.append(Piece(_cut(row, length)(out.x), state, logits[row : row + 1], of_row))
        return found

    def _forward(self) -> tuple[BlockOutput, Tensor]:
        """With the logits after the last token of each row, which are anything where there is none."""
        out, lengths = self._place.stack(), self._place.lengths
        assert lengths is not None
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, out.x.shape[-1])
        with without_autocast(lengths.device):
            return out, self._place.model.logits(out.x.gather(1, last)[:, 0])


def _cut(row: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[row : row + 1, :length]


def _joined(lists: Sequence[list[Tensor]]) -> list[Tensor]:
    return [tensor for each in lists for tensor in each]


def _rows(state: StackState, count: int) -> StackState:
    """The first rows of a batch, where they lie."""
    return state.map(lambda tensor: tensor[:count])


def _values(form: StackState, states: Sequence[list[Tensor]]) -> list[StackState]:
    """States of that form that no replay overwrites, with the values of the tensors of each."""
    own = [[torch.empty_like(tensor) for tensor in state] for state in states]
    copy_all(_joined(own), _joined(states))
    return [form.with_tensors(tensors) for tensors in own]


def prefill(
    model: LanguageModel,
    prompt: Tensor,
    state: StackState | None = None,
    *,
    valid: Tensor | None = None,
    chunk: int = 2048,
    capture: bool = True,
) -> Prefilled:
    """Read prompts through the parallel path, ``chunk`` tokens at a time. Of many prompts, one :class:`Reader` reads
    all.

    Args:
        model: that reads.
        prompt: ``(B, L)`` tokens, L at least 1.
        state: to go on from; None for the beginning of a stream.
        valid: ``(B, L)`` bool, True on real tokens, padding may lie anywhere; every row needs one.
        chunk: how many columns are read at once.
        capture: False never captures a CUDA graph, see :class:`Reader`.

    Raises:
        ConfigError: the chunk is below 1, the prompt is empty or a row of it is all padding.
        ShapeError: the prompt or ``valid`` have the wrong shape or dtype, or a token is not in the vocabulary.
        StreamingError: the model cannot stream, or the state does not fit.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").eval()
        >>> prefill(model, torch.tensor([[72, 101, 108]]), chunk=2).logits.shape
        torch.Size([1, 256])
    """
    return Reader(model, chunk, capture=capture).read(prompt, state, valid=valid)


def _last(features: Tensor, valid: Tensor | None, before: Tensor) -> Tensor:
    """The features at the last real token of each row; ``before`` where the chunk holds none."""
    if valid is None:
        return features[:, -1].to(before.dtype)
    column = valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
    found = features[torch.arange(features.shape[0], device=features.device), column].to(before.dtype)
    return torch.where(valid.any(1, keepdim=True), found, before)

"""Streaming state: what is kept of a sequence for its continuation, bounded in size.

A state is a frozen dataclass whose fields are tensors with the batch first, further states, or tuples, dicts and None
of these. It is never changed in place: ``forward`` takes one and returns a new one, so keeping the old one is all that
a rollback needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from sma.errors import StreamingError


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, State):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_map(item, fn) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, fn) for key, item in value.items()}
    return value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor | str]]:
    """The tensors and the class of each state, by their place."""
    if isinstance(value, Tensor):
        yield name, value
        return
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, State):
        yield name, type(value).__name__
        inside = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, tuple):
        inside = enumerate(value)
    elif isinstance(value, dict):
        inside = value.items()
    for key, item in inside:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _collect(value: Any, tensors: list[Tensor]) -> None:
    """The tensors in the order of :func:`_leaves`, which is too slow for decoding."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, State):
        for name in value.__dataclass_fields__:
            _collect(getattr(value, name), tensors)
    elif isinstance(value, tuple):
        for item in value:
            _collect(item, tensors)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, tensors)


def _form(value: Any, form: list[Any]) -> None:
    """How a state is built, whatever its batch and its numbers."""
    if isinstance(value, Tensor):
        form.append(value.shape[1:])
    elif isinstance(value, State):
        form.append(type(value))
        for name in value.__dataclass_fields__:
            _form(getattr(value, name), form)
    elif isinstance(value, tuple):
        form.append(len(value))
        for item in value:
            _form(item, form)
    elif isinstance(value, dict):
        form.append(tuple(value))
        for item in value.values():
            _form(item, form)
    else:
        form.append(None)


S = TypeVar("S", bound="State")


@dataclass(frozen=True)
class State:
    """Base of every streaming state."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A new state with ``fn`` applied to every tensor."""
        return type(self)(**{name: _map(getattr(self, name), fn) for name in self.__dataclass_fields__})

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """A new state with other tensors, in the order of :meth:`tensors`."""
        others = iter(tensors)
        return self.map(lambda _: next(others))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, in the order of the fields."""
        tensors: list[Tensor] = []
        _collect(self, tensors)
        return tensors

    def named_tensors(self) -> dict[str, Tensor]:
        """The same, by their place: ``layers.0.activate.seen``, for instance."""
        return {name: leaf for name, leaf in _leaves(self, "") if isinstance(leaf, Tensor)}

    def kinds(self) -> dict[str, str]:
        """By its place the class of every state inside; of this one under ``""``."""
        return {name: leaf for name, leaf in _leaves(self, "") if isinstance(leaf, str)}

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self.map(torch.clone)

    def detach(self) -> Self:
        """The same values, cut from the autograd graph."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The state on another device, and its floating-point tensors in another dtype."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def reorder(self, index: Tensor) -> Self:
        """Rows ``index (B',)`` of the batch, as beam search asks for; a row may occur several times."""
        return self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def select(self, *rows: int) -> Self:
        """Some rows of the batch, by number: :meth:`reorder` without a tensor."""
        tensors = self.tensors()
        device = tensors[0].device if tensors else None
        return self.reorder(torch.tensor(rows, dtype=torch.int64, device=device))

    def put(self, index: Tensor, other: Self) -> Self:
        """A new state in which the n rows of ``other`` stand in place of rows ``index (n,)``.

        Raises:
            StreamingError: the other state is built differently.
        """
        theirs = iter(_matching(self, other))
        return self.map(
            lambda tensor: tensor.index_copy(0, index.to(tensor.device), next(theirs).to(tensor.device, tensor.dtype))
        )

    @classmethod
    def cat(cls, states: Sequence[S]) -> S:
        """One state of the batches of several, in their order.

        Raises:
            StreamingError: there are none, or they are built differently.

        Example:
            >>> from sma import WorkingMemory
            >>> one, two = (WorkingMemory.empty(batch, 8, torch.zeros(0, 3)) for batch in (1, 2))
            >>> State.cat([one, two]).count.shape
            torch.Size([3])
        """
        if not states:
            raise StreamingError("State.cat: needs at least one state, got none")
        others = [iter(_matching(states[0], state)) for state in states[1:]]
        return states[0].map(lambda tensor: torch.cat([tensor, *(next(other) for other in others)]))

    def form(self) -> list[Any]:
        """How it is built, whatever its batch and its numbers: between states of one form there is no
        :func:`difference`, which takes several times as long, for what it would say.
        """
        form: list[Any] = []
        _form(self, form)
        return form

    @property
    def nbytes(self) -> int:
        """Size in bytes, counted over the elements (not over shared or over-allocated storage)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def _matching(one: State, other: State) -> list[Tensor]:
    """The tensors of ``other``, which are those of ``one`` but for the batch."""
    problem = misfit(one, other)
    if problem is not None:
        raise StreamingError(f"state: {problem}")
    return other.tensors()


def misfit(one: State, other: State, form: list[Any] | None = None) -> str | None:
    """What keeps ``other`` from being built like ``one`` but for the batch, or None; ``form`` is that of ``one``."""
    tensors = other.tensors()
    alike = other.form() == (one.form() if form is None else form)
    if alike and all(each.shape[0] == tensors[0].shape[0] for each in tensors):
        return None
    return difference(one, other.kinds(), other.named_tensors())


def difference(one: State, kinds: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str | None:
    """What keeps these states and tensors, by their places, from being those of ``one`` but for the batch, or None."""
    ours: dict[str, Any] = {
        **one.kinds(),
        **{name: tuple(each.shape[1:]) for name, each in one.named_tensors().items()},
    }
    theirs: dict[str, Any] = {**kinds, **{name: tuple(each.shape[1:]) for name, each in tensors.items()}}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            place = name or "the whole"
            return f"{place} must be {_described(ours.get(name))}, got {_described(theirs.get(name))}"
    batches = [each.shape[0] for each in tensors.values()]  # no set: in a graph these may be symbols
    if any(each != batches[0] for each in batches):
        return f"every tensor must be of one batch, got {sorted(set(batches))}"
    return None


def _described(what: tuple[int, ...] | str | None) -> str:
    if isinstance(what, tuple):
        return f"(B, {', '.join(map(str, what))})" if what else "(B,)"
    return what or "absent"


class StateHistory(Generic[S]):
    """The last states of a stream, so that it can be rolled back, for instance after rejected draft tokens.

    Args:
        limit: how many steps back can be reached. Memory is at most ``limit + 1`` states.

    Example:
        >>> from sma import WorkingMemory
        >>> history, state = StateHistory(limit=4), WorkingMemory.empty(1, 8, torch.zeros(0, 3))
        >>> history.push(state)
        >>> history.push(state.clone())
        >>> history.rollback(1) is state
        True
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise StreamingError(f"StateHistory: limit must be at least 1, got {limit}")
        self.limit = limit
        self._states: deque[S] = deque(maxlen=limit + 1)

    def __len__(self) -> int:
        return len(self._states)

    def push(self, state: S) -> None:
        """Remember the state after one more step; the oldest is forgotten beyond ``limit``."""
        self._states.append(state)

    def rollback(self, steps: int) -> S:
        """Forget the last ``steps`` states and return the one before them.

        Raises:
            StreamingError: fewer states are remembered.
        """
        if not 0 <= steps < len(self._states):
            raise StreamingError(
                f"StateHistory: cannot roll back {steps} steps, {len(self._states)} states are remembered"
            )
        for _ in range(steps):
            self._states.pop()
        return self._states[-1]

"""A running batch of sequences that decode together, each from where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.steppers import Decision, SlotSpec, StepContext
from sma_models.embeddings import like_of
from sma_models.inference.graphs import Graph, copy_all
from sma_models.inference.prefill import Reader
from sma_models.language_model import LanguageModel, ModelStepper
from sma_models.stack import StackState, position_of

_SEAT_FROM = 8
"""Slots from which on states take theirs by a graph, which costs the memory of one state more."""


class Decoder:
    """SlotSpec for a number of sequences on the device of a model, one token of each at a time.

    The memory is allocated once and changes in place. A sequence joins a free *slot* once its prompt was read, in
    chunks, by the ordinary parallel path, and leaves it when it is done; the others notice neither. A step has the same
    shapes whoever is there, and on a CUDA device it is captured as a graph at the first call, unless a part of the
    model says why not (:attr:`uncaptured`). What a step costs does not depend on how long the sequences are.

    A functional :class:`~sma_models.stack.StackState` is what comes in and goes out: :meth:`read` and :meth:`write`.

    Args:
        model: in evaluation mode. Its weights are used where they lie, and may change in place between steps; then call
            :meth:`refresh`.
        slots: how many sequences there is room for.
        rollback: how many of its last tokens a sequence can take back, for drafts that are rejected.
        prefill_chunk: prompts are read this many tokens at a time.
        capture: False never captures a graph, neither of steps nor of chunks.

    Attributes:
        reader: reads the prompts, and says whether their chunks are captured.
        logits: ``(S, vocab_size)`` of the token after the last one of every slot; written in place.

    Raises:
        ConfigError: an argument is out of range, or the model is in training mode.
        StreamingError: the model cannot stream; the message says why.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").eval()
        >>> decoder = Decoder(model, slots=2)
        >>> slot = decoder.join(torch.tensor([72, 101]))
        >>> logits = decoder.step({slot: int(decoder.logits[slot].argmax())})
        >>> logits.shape
        torch.Size([2, 256])
        >>> decoder.leave(slot)
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        *,
        rollback: int = 0,
        prefill_chunk: int = 2048,
        capture: bool = True,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("rollback", rollback, 0), ("prefill_chunk", prefill_chunk, 1)):
            if value < least:
                raise ConfigError(f"{name}: must be at least {least}, got {value}")
        if model.training:
            raise ConfigError("model: must be in evaluation mode to decode, call model.eval() first")
        self.model, self.slots, self.rollback = model, slots, rollback
        self.reader = Reader(model, prefill_chunk, capture=capture)
        weight = like_of(model.embedding)
        with torch.no_grad():
            self._stepper = ModelStepper(model, SlotSpec(slots, rollback, weight))
        self._position = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self._live = torch.zeros(slots, dtype=torch.bool, device=weight.device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self.logits = torch.zeros(slots, model.vocab_size, dtype=weight.dtype, device=weight.device)
        self._decisions: dict[str, Decision] = {}
        self._taken: list[int | None] = [None] * slots  # tokens since the slot was written, None where it is free
        self._set_live: list[bool] = [False] * slots
        self._capture = capture
        able = capture and weight.is_cuda and not self._stepper.why_uncaptured()
        self._graph: Graph[dict[str, Decision]] | None = Graph(weight.device) if able else None
        self._seat = _Seat(self) if able and slots >= _SEAT_FROM else None

    @property
    def uncaptured(self) -> dict[str, str]:
        """Why no CUDA graph can hold a step, by the name of each part that is in the way.

        Where a capture was tried and failed, what CUDA said is the reason, under the name of the whole, ``""``.
        """
        failed = None if self._graph is None else self._graph.failure
        return self._stepper.why_uncaptured() | ({} if failed is None else {"": failed})

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self._graph is not None and self._graph.ready

    @property
    def occupied(self) -> list[int]:
        """The slots that hold a sequence."""
        return [slot for slot, taken in enumerate(self._taken) if taken is not None]

    @property
    def free(self) -> int:
        """How many more sequences there is room for."""
        return self.slots - len(self.occupied)

    @property
    def positions(self) -> Tensor:
        """``(S,)`` int64: tokens that each slot has taken, its prompt included."""
        return self._position.clone()

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """Who was active in the last step, and with which confidence, by the name of the layer."""
        return {name: Decision(*(part.clone() for part in decision)) for name, decision in self._decisions.items()}

    @property
    def nbytes(self) -> int:
        """Size of the memory of all slots in bytes."""
        tensors = [tensor for _, part in self._stepper.walk() for tensor in part.memory()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def join(self, prompt: Tensor, state: StackState | None = None) -> int:
        """Read a prompt and give its sequence a slot; ``logits[slot]`` is then what follows it.

        Args:
            prompt: ``(L,)`` tokens, at least one.
            state: of one sequence, to go on from.

        Returns:
            The slot.

        Raises:
            StreamingError: every slot is taken.
            ConfigError: the prompt is empty.
            ShapeError: the prompt is no row of tokens.
        """
        if prompt.dim() != 1:
            raise ShapeError(f"prompt: must be one row of tokens (L,), got {tuple(prompt.shape)}")
        return self.join_all(prompt[None], state)[0]

    def join_all(self, prompts: Tensor, state: StackState | None = None, *, valid: Tensor | None = None) -> list[int]:
        """Read several prompts ``(B, L)`` at once, padded on either side with ``valid (B, L)``; see :meth:`join`."""
        self._check_room(prompts.shape[0])
        read = self.reader.read(prompts, state, valid=valid)
        return self.resume(read.state, read.logits)

    def resume(self, state: StackState, logits: Tensor | None = None, *, checked: bool = False) -> list[int]:
        """Give the sequences of a state slots of their own, to go on from there.

        Args:
            state: of one or several sequences.
            logits: ``(B, V)`` of their next tokens; zeros if None.
            checked: the state is known to be one of the model, from a reader or a decoder of it. Then it is not looked
                at, for which the device would be waited for.

        Returns:
            The slots, in the order of the sequences.

        Raises:
            StreamingError: there are not so many free slots, or the state does not fit the model.
        """
        position = position_of(state, checked=True) if checked else self._position_of(state)
        self._check_room(position.numel())
        slots = [slot for slot, taken in enumerate(self._taken) if taken is None][: position.numel()]
        self._write(slots, state, logits, position)
        return slots

    def acquire(self) -> int:
        """Take a free slot, at the beginning of a stream. :meth:`write` puts a state there.

        Raises:
            StreamingError: every slot is taken.
        """
        return self.resume(self.model.initial_state(1))[0]

    def leave(self, slot: int) -> None:
        """Free a slot.

        Raises:
            StreamingError: it holds no sequence.
        """
        self._check_occupied(slot)
        self._taken[slot] = None

    @torch.no_grad()
    def step(self, tokens: Tensor | Mapping[int, int], *, live: Tensor | None = None) -> Tensor:
        """One token of every sequence, or of some.

        Args:
            tokens: ``(S,)`` integers, the next token of every occupied slot (what stands at free ones does not
                matter), or the tokens of some slots by their number; the others stay where they are.
            live: ``(S,)`` bool, on the device: which of the occupied slots take their token, where only the device
                knows. Not together with ``rollback``, which has to know it here.

        Returns:
            Logits ``(S, vocab_size)`` of the tokens after these: ``logits``, which the next step overwrites. Rows
            of slots that took no token keep their values.

        Raises:
            StreamingError: a slot is given that holds no sequence, or ``live`` in spite of ``rollback``.
            ShapeError: ``live`` or the tokens have the wrong shape or dtype, or (checked on the CPU) tokens are not in
                the vocabulary.
        """
        if live is not None:
            self._check_live(live)
        if self._stepper.outdated():
            self._rebuild()
        slots = self._put_tokens(tokens, live)
        if not slots:
            return self.logits
        self._decisions = self._advance() if self._graph is None else self._graph.run(self._advance)
        for slot in slots:
            taken = self._taken[slot]
            assert taken is not None
            self._taken[slot] = taken + 1
        return self.logits

    def read(self, slot: int) -> StackState:
        """The state of a sequence, as a value of its own.

        Raises:
            StreamingError: the slot holds no sequence.
        """
        return self.read_all([slot])

    def read_all(self, slots: Sequence[int]) -> StackState:
        """The states of several sequences as one batch."""
        for slot in slots:
            self._check_occupied(slot)
        index = torch.tensor(slots, dtype=torch.int64, device=self._position.device)
        return self._stepper.read(index, self._position[index])

    def write(self, slot: int, state: StackState, logits: Tensor | None = None) -> None:
        """Go on from a state in a slot that was taken.

        Args:
            slot: from :meth:`acquire` or :meth:`join`; what it held is forgotten.
            state: of one sequence.
            logits: ``(V,)`` or ``(1, V)`` of its next token; zeros if None.

        Raises:
            StreamingError: the slot is free, or the state does not fit the model.
        """
        self.write_all([slot], state, logits)

    def write_all(self, slots: Sequence[int], state: StackState, logits: Tensor | None = None) -> None:
        """The same for several slots and a state of as many sequences; logits ``(n, V)``."""
        for slot in slots:
            self._check_occupied(slot)
        self._write(list(slots), state, logits, self._position_of(state))

    def take_back(self, slot: int, tokens: int) -> None:
        """Forget the last tokens of a sequence, as if they had never come. ``logits`` are not restored.

        Raises:
            StreamingError: the slot is free, or the tokens are more than ``rollback`` or than were taken since the slot
                was written.
        """
        self._check_occupied(slot)
        reach = min(self.rollback, self._taken[slot] or 0)
        if not 0 <= tokens <= reach:
            raise StreamingError(f"slot {slot}: can take back up to {reach} tokens, got {tokens}")
        self._stepper.rolled_back(slot, tokens)
        self._position[slot] -= tokens
        # What lies behind the oldest version is gone.
        self._taken[slot] = reach - tokens

    def refresh(self) -> None:
        """Take notice of weights that changed in place.

        Parts that were replaced, wrapped or hooked are noticed by the next step as well.
        """
        if self._stepper.outdated():
            self._rebuild()
        with torch.no_grad():
            self._stepper.refresh()

    @torch.no_grad()
    def _rebuild(self) -> None:
        """Choose the steppers of the model anew. The sequences go on, but take back no token of before."""
        slots = self.occupied
        index = torch.tensor(slots, dtype=torch.int64, device=self._position.device)
        state = self._stepper.read(index, self._position[index]) if slots else None
        self._stepper = ModelStepper(self.model, SlotSpec(self.slots, self.rollback, like_of(self.model.embedding)))
        able = self._capture and self.logits.is_cuda and not self._stepper.why_uncaptured()
        self._graph = Graph(self.logits.device) if able else None
        self._seat = _Seat(self) if able and self.slots >= _SEAT_FROM else None
        if state is not None:
            self._stepper.write(index, state, self._position[index])
        for slot in slots:
            self._taken[slot] = 0

    def _position_of(self, state: StackState) -> Tensor:
        """Where the sequences of a state stand, if it is one of the model."""
        self._stepper.check(state)
        return position_of(state)

    @torch.no_grad()
    def _write(self, slots: list[int], state: StackState, logits: Tensor | None, position: Tensor) -> None:
        if position.numel() != len(slots):
            raise StreamingError(f"state: must be of {len(slots)} sequences, got {position.numel()}")
        if self._seat is not None and self._seat.fits(state):
            self._seat.take(self._put, slots[0], state, position, logits)
        else:
            index = torch.tensor(slots, dtype=torch.int64, device=self._position.device)
            self._put(index, state, position.to(index.device), logits)
        for slot in slots:
            self._taken[slot] = 0

    def _put(self, slots: Tensor, state: StackState, position: Tensor, logits: Tensor | None) -> None:
        """A state to where the slots ``(n,)`` lie."""
        self._stepper.write(slots, state, position)
        self._position[slots] = position
        self.logits[slots] = 0 if logits is None else logits.to(self.logits)

    def _advance(self) -> dict[str, Decision]:
        """A step, from the tokens where they lie to the logits where they lie."""
        with torch.autocast(self._tokens.device.type, enabled=False):
            context = StepContext(self._live, self._position)
            tokens = self._tokens.masked_fill(~self._live, 0)  # elsewhere may stand anything
            logits, decisions = self._stepper.step(tokens, context)
            self.logits.copy_(torch.where(self._live[:, None], logits, self.logits))
            self._position += self._live
        return decisions

    def _put_tokens(self, tokens: Tensor | Mapping[int, int], some: Tensor | None) -> list[int]:
        """Put the tokens in place, and who is to take one; the slots that may."""
        if isinstance(tokens, Mapping):
            slots = sorted(tokens)
            for slot in slots:
                self._check_occupied(slot)
            row = [tokens.get(slot, 0) for slot in range(self.slots)]
            tokens = torch.tensor(row, dtype=torch.int64)
        else:
            slots = self.occupied
            if tokens.shape != (self.slots,) or tokens.is_floating_point() or tokens.dtype == torch.bool:
                raise ShapeError(
                    f"tokens: must be integers of shape ({self.slots},), got {tokens.dtype} {tuple(tokens.shape)}"
                )
        chosen = set(slots)
        live = [slot in chosen for slot in range(self.slots)]
        if tokens.device.type == "cpu":
            for slot in slots:
                if not 0 <= int(tokens[slot]) < self.model.vocab_size:
                    raise ShapeError(
                        f"tokens[{slot}]: must lie in 0..{self.model.vocab_size - 1}, got {int(tokens[slot])}"
                    )
        if live != self._set_live or some is not None:
            self._live.copy_(torch.tensor(live), non_blocking=True)
            self._set_live = live
        if some is not None:
            self._live &= some
            self._set_live = []  # what the device holds is not known here
        self._tokens.copy_(tokens, non_blocking=True)
        return slots

    def _check_live(self, live: Tensor) -> None:
        if live.shape != (self.slots,) or live.dtype != torch.bool:
            raise ShapeError(f"live: must be bool of shape ({self.slots},), got {live.dtype} {tuple(live.shape)}")
        if self.rollback:
            raise StreamingError(f"live: must not be given to a decoder with rollback={self.rollback}")

    def _check_room(self, sequences: int) -> None:
        if sequences > self.free:
            raise StreamingError(f"Decoder: {self.free} of {self.slots} slots are free, got {sequences} sequences")

    def _check_occupied(self, slot: int) -> None:
        if not 0 <= slot < self.slots or self._taken[slot] is None:
            raise StreamingError(f"slot {slot}: holds no sequence; those that do are {self.occupied}")


class _Seat:
    """The state of one sequence on its way into a slot: hundreds of small copies, as one CUDA graph."""

    def __init__(self, decoder: Decoder) -> None:
        device = decoder.logits.device
        self._state = decoder.model.initial_state(1)
        self._places = self._state.tensors()
        self._dtypes = [each.dtype for each in self._places]
        self._slot, self._position = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self._logits = torch.zeros_like(decoder.logits[:1])
        self._graph: Graph[None] = Graph(device)

    def fits(self, state: StackState) -> bool:
        """Whether it is of one sequence, and nothing of it would be rounded on the way."""
        tensors = state.tensors()
        return tensors[0].shape[0] == 1 and [each.dtype for each in tensors] == self._dtypes

    def take(
        self, put: Callable[..., None], slot: int, state: StackState, position: Tensor, logits: Tensor | None
    ) -> None:
        """Put a state into a slot, by ``put`` of the decoder."""
        copy_all(self._places, state.tensors())
        self._slot.fill_(slot)
        self._position.copy_(position)
        if logits is None:
            self._logits.zero_()
        else:
            self._logits.copy_(logits.view_as(self._logits))
        self._graph.run(lambda: put(self._slot, self._state, self._position, self._logits))

"""A running batch of sequences, each at its own position, that decode one token at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.runtime.captured_function import CapturedFunction
from sma.steppers import Decision, SlotSpec, StepContext
from sma_models.embeddings import like_of
from sma_models.inference.captured_slot_write import CapturedSlotWrite
from sma_models.inference.prefiller import Prefiller
from sma_models.language_model import LanguageModel, ModelStepper
from sma_models.stack import StackState, position_of

_MIN_SLOTS_TO_CAPTURE_WRITES = 8
"""With fewer slots, states are written eagerly: the graph of a write takes the memory of one more state."""


class Decoder:
    """Memory for a fixed number of sequences on the device of a model, which decode one token each per step.

    The memory is allocated once and changes in place. The prompt of a sequence is prefilled in chunks by the parallel
    model; then the sequence takes a free *slot*, and leaves it when it is done. Other slots are not affected.

    Every step has the same shapes. On a CUDA device it is captured as a graph after its first runs, unless a part of
    the model prevents it (:attr:`uncaptured`). The cost of a step does not depend on the length of the sequences.

    States enter and leave as values (:class:`~sma_models.stack.StackState`): :meth:`read` and :meth:`write`.

    Args:
        model: in evaluation mode. Its weights are used where they lie, and may change in place between steps; then call
            :meth:`refresh`.
        slots: the largest number of sequences.
        rollback: how many of its last tokens a sequence can take back, for drafts that are rejected.
        prefill_chunk: prompts are prefilled this many tokens at a time.
        capture: False never captures a graph, neither of steps nor of chunks.

    Attributes:
        prefiller: runs the prompts, and says whether their chunks are captured.
        logits: ``(S, vocab_size)`` of the next token of every slot; every step overwrites them.

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
        self.prefiller = Prefiller(model, prefill_chunk, capture=capture)
        weight = like_of(model.embedding)
        with torch.no_grad():
            self._stepper = ModelStepper(model, SlotSpec(slots, rollback, weight))
        self._position = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self._live = torch.zeros(slots, dtype=torch.bool, device=weight.device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self.logits = torch.zeros(slots, model.vocab_size, dtype=weight.dtype, device=weight.device)
        self._decisions: dict[str, Decision] = {}
        self._tokens_since_write: list[int | None] = [None] * slots  # None where the slot is free
        self._live_on_host: list[bool] = [False] * slots  # empty if only the device holds it
        self._capture = capture
        self._prepare_capture()

    @property
    def uncaptured(self) -> dict[str, str]:
        """Why steps are not captured, by the name of each part that prevents it.

        Where a capture was tried and failed, the reason is CUDA's message, under the name of the whole, ``""``.
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
        return [slot for slot, taken in enumerate(self._tokens_since_write) if taken is not None]

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self.slots - len(self.occupied)

    @property
    def positions(self) -> Tensor:
        """``(S,)`` int64: tokens that each slot has processed, its prompt included."""
        return self._position.clone()

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """Which modules were active in the last step, and with which confidence, by the name of the layer."""
        return {name: Decision(*(part.clone() for part in decision)) for name, decision in self._decisions.items()}

    @property
    def nbytes(self) -> int:
        """Size of the memory of all slots in bytes."""
        tensors = [tensor for _, part in self._stepper.walk() for tensor in part.memory()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def join(self, prompt: Tensor, state: StackState | None = None) -> int:
        """Prefill a prompt and give its sequence a slot; ``logits[slot]`` are then those of the next token.

        Args:
            prompt: ``(L,)`` tokens, at least one.
            state: of one sequence, before the prompt.

        Returns:
            The slot.

        Raises:
            StreamingError: every slot is taken.
            ConfigError: the prompt is empty.
            ShapeError: the prompt is not one row of tokens.
        """
        if prompt.dim() != 1:
            raise ShapeError(f"prompt: must be one row of tokens (L,), got {tuple(prompt.shape)}")
        return self.join_all(prompt[None], state)[0]

    def join_all(self, prompts: Tensor, state: StackState | None = None, *, valid: Tensor | None = None) -> list[int]:
        """Prefill several prompts ``(B, L)`` at once, padded on either side with ``valid (B, L)``; see :meth:`join`."""
        self._check_free(prompts.shape[0])
        prefilled = self.prefiller.prefill(prompts, state, valid=valid)
        return self.resume(prefilled.state, prefilled.logits)

    def resume(self, state: StackState, logits: Tensor | None = None, *, checked: bool = False) -> list[int]:
        """Give each sequence of a state a slot, to continue from there.

        Args:
            state: of one or several sequences.
            logits: ``(B, V)`` of their next tokens; zeros if None.
            checked: the state comes from a prefiller or a decoder of this model. Then it is not checked, as a check
                synchronises with the device.

        Returns:
            The slots, in the order of the sequences.

        Raises:
            StreamingError: fewer slots are free, or the state does not fit the model.
        """
        position = position_of(state, checked=True) if checked else self._position_of(state)
        self._check_free(position.numel())
        slots = [slot for slot, taken in enumerate(self._tokens_since_write) if taken is None][: position.numel()]
        self._write(slots, state, logits, position)
        return slots

    def acquire(self) -> int:
        """Take a free slot at the beginning of a stream; :meth:`write` replaces its state.

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
        self._tokens_since_write[slot] = None

    @torch.no_grad()
    def step(self, tokens: Tensor | Mapping[int, int], *, live: Tensor | None = None) -> Tensor:
        """Process one token of every sequence, or of some.

        Args:
            tokens: ``(S,)`` integers, the next token of every occupied slot (values at free slots are ignored), or the
                tokens of some slots by their number; the other slots do not change.
            live: ``(S,)`` bool, on the device: which of the occupied slots take their token, where only the device
                holds it. Not with ``rollback``, which counts tokens on the host.

        Returns:
            ``logits (S, vocab_size)`` of the next tokens, which the next step overwrites. Rows of slots that took no
            token keep their values.

        Raises:
            StreamingError: a slot holds no sequence, or ``live`` is given to a decoder with ``rollback``.
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
            count = self._tokens_since_write[slot]
            assert count is not None
            self._tokens_since_write[slot] = count + 1
        return self.logits

    def read(self, slot: int) -> StackState:
        """The state of a sequence, as a value.

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
        """Replace the state of an occupied slot.

        Args:
            slot: from :meth:`acquire` or :meth:`join`.
            state: of one sequence.
            logits: ``(V,)`` or ``(1, V)`` of its next token; zeros if None.

        Raises:
            StreamingError: the slot is free, or the state does not fit the model.
        """
        self.write_all([slot], state, logits)

    def write_all(self, slots: Sequence[int], state: StackState, logits: Tensor | None = None) -> None:
        """Replace the states of n occupied slots by a state of n sequences; logits ``(n, V)``."""
        for slot in slots:
            self._check_occupied(slot)
        self._write(list(slots), state, logits, self._position_of(state))

    def take_back(self, slot: int, tokens: int) -> None:
        """Undo the last tokens of a sequence. ``logits`` are not restored.

        Raises:
            StreamingError: the slot is free, or the tokens are more than ``rollback`` or than were processed since the
                slot was written.
        """
        self._check_occupied(slot)
        reach = min(self.rollback, self._tokens_since_write[slot] or 0)
        if not 0 <= tokens <= reach:
            raise StreamingError(f"slot {slot}: can take back up to {reach} tokens, got {tokens}")
        self._stepper.rolled_back(slot, tokens)
        self._position[slot] -= tokens
        # Older versions than this are overwritten.
        self._tokens_since_write[slot] = reach - tokens

    def refresh(self) -> None:
        """Compute again what was derived from weights, which changed in place.

        Parts that were replaced, wrapped or hooked are noticed by the next step as well.
        """
        if self._stepper.outdated():
            self._rebuild()
        with torch.no_grad():
            self._stepper.refresh()

    @torch.no_grad()
    def _rebuild(self) -> None:
        """Choose the steppers of the model anew. The sequences continue, but cannot take back earlier tokens."""
        slots = self.occupied
        index = torch.tensor(slots, dtype=torch.int64, device=self._position.device)
        state = self._stepper.read(index, self._position[index]) if slots else None
        self._stepper = ModelStepper(self.model, SlotSpec(self.slots, self.rollback, like_of(self.model.embedding)))
        self._prepare_capture()
        if state is not None:
            self._stepper.write(index, state, self._position[index])
        for slot in slots:
            self._tokens_since_write[slot] = 0

    def _prepare_capture(self) -> None:
        """The graphs of steps and writes, if the device and the parts of the model allow them."""
        device, able = self.logits.device, self._capture and self.logits.is_cuda and not self._stepper.why_uncaptured()
        self._graph: CapturedFunction[dict[str, Decision]] | None = CapturedFunction(device) if able else None
        many = self.slots >= _MIN_SLOTS_TO_CAPTURE_WRITES
        self._slot_write = CapturedSlotWrite(self.model, self.logits) if able and many else None

    def _position_of(self, state: StackState) -> Tensor:
        """The positions of the sequences of a state, which must be one of the model."""
        self._stepper.check(state)
        return position_of(state)

    @torch.no_grad()
    def _write(self, slots: list[int], state: StackState, logits: Tensor | None, position: Tensor) -> None:
        if position.numel() != len(slots):
            raise StreamingError(f"state: must be of {len(slots)} sequences, got {position.numel()}")
        if self._slot_write is not None and self._slot_write.fits(state):
            self._slot_write.run(self._write_slots, slots[0], state, position, logits)
        else:
            index = torch.tensor(slots, dtype=torch.int64, device=self._position.device)
            self._write_slots(index, state, position.to(index.device), logits)
        for slot in slots:
            self._tokens_since_write[slot] = 0

    def _write_slots(self, slots: Tensor, state: StackState, position: Tensor, logits: Tensor | None) -> None:
        """Copy a state of n sequences into ``slots (n,)``."""
        self._stepper.write(slots, state, position)
        self._position[slots] = position
        self.logits[slots] = 0 if logits is None else logits.to(self.logits)

    def _advance(self) -> dict[str, Decision]:
        """A step in place: from ``_tokens`` and ``_live`` to ``logits``."""
        with torch.autocast(self._tokens.device.type, enabled=False):
            context = StepContext(self._live, self._position)
            tokens = self._tokens.masked_fill(~self._live, 0)  # other slots may hold any number
            logits, decisions = self._stepper.step(tokens, context)
            self.logits.copy_(torch.where(self._live[:, None], logits, self.logits))
            self._position += self._live
        return decisions

    def _put_tokens(self, tokens: Tensor | Mapping[int, int], live: Tensor | None) -> list[int]:
        """Copy the tokens to ``_tokens``, and to ``_live`` which slots take one; returns the slots that may."""
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
        if tokens.device.type == "cpu":
            for slot in slots:
                if not 0 <= int(tokens[slot]) < self.model.vocab_size:
                    raise ShapeError(
                        f"tokens[{slot}]: must lie in 0..{self.model.vocab_size - 1}, got {int(tokens[slot])}"
                    )
        chosen = set(slots)
        on_host = [slot in chosen for slot in range(self.slots)]
        if on_host != self._live_on_host or live is not None:
            self._live.copy_(torch.tensor(on_host), non_blocking=True)
            self._live_on_host = on_host
        if live is not None:
            self._live &= live
            self._live_on_host = []
        self._tokens.copy_(tokens, non_blocking=True)
        return slots

    def _check_live(self, live: Tensor) -> None:
        if live.shape != (self.slots,) or live.dtype != torch.bool:
            raise ShapeError(f"live: must be bool of shape ({self.slots},), got {live.dtype} {tuple(live.shape)}")
        if self.rollback:
            raise StreamingError(f"live: must not be given to a decoder with rollback={self.rollback}")

    def _check_free(self, sequences: int) -> None:
        if sequences > self.free:
            raise StreamingError(f"Decoder: {self.free} of {self.slots} slots are free, got {sequences} sequences")

    def _check_occupied(self, slot: int) -> None:
        if not 0 <= slot < self.slots or self._tokens_since_write[slot] is None:
            raise StreamingError(f"slot {slot}: holds no sequence; those that do are {self.occupied}")

"""Continuous batching: prompts are read in pieces, texts are written together, and everyone gets a turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma.steppers import Decision
from sma_models.inference import Decoder, Reader
from sma_models.inference.graphs import WARMUP
from sma_models.inference.prefiller import Pass, Piece
from sma_models.inference.sampling import Likelihood, draw, likelihoods
from sma_models.inference.sequences import Activated, Event, Failed, Finished, Prompt, Read, Text, Ticket, Written
from sma_models.language_model import LanguageModel
from sma_models.serving.errors import full, unavailable
from sma_models.serving.limits import Limits
from sma_models.serving.text import ends_with_stop

_PROMPTS_A_ROUND = 8
"""Short prompts that are read one by one between two steps at most: each costs a pass, however short."""
_PROMPTS_TOGETHER = 4
"""Whose whole pieces one pass reads where passes are captured, and more of shorter ones; each has a state there."""
_STEPS_A_PASS, _STEPS_IN_NO_HURRY = 8, 32
"""That are taken before a pass with rows to spare: it costs as much as a full one, and as much as several steps. The
second where texts wait for a slot, so that nobody would write any sooner."""

log = logging.getLogger(__name__)


class Engine:
    """Writes the texts of many requests at once, in a thread of its own.

    A *round* reads up to ``prefill_chunk`` tokens of the prompts that wait, a piece of each in turn, so that a long one
    does not stall the others; gives free slots to the texts that wait; and takes one step of all that have a slot.
    Where pieces of several prompts are read in one pass, a round has one pass at most: of the first prompt, and of
    those behind it with pieces of the same size. While texts are written, one for a few prompts waits for a few steps.
    Where texts wait for a slot, one that has had its own for ``quantum`` tokens goes to the end of the line: its state
    has a constant size and is put aside and back without a change of a bit.

    Args:
        model: a language model of bytes in evaluation mode.
        limits: slots, queue, quantum and piece.
        capture: False never captures a CUDA graph.

    Attributes:
        channels: the names of the layers that decide, in the order in which activations are told; a layer of several
            modules appears once for each, as ``name[0]``, ``name[1]``.

    Raises:
        ConfigError: the model is no language model of bytes, or is in training mode.
        StreamingError: the model cannot stream; the message says why.
    """

    def __init__(self, model: LanguageModel, limits: Limits, *, capture: bool = True) -> None:
        if not isinstance(model, LanguageModel) or model.vocab_size != 256:
            raise ConfigError(f"model: must be a language model of bytes (vocab_size 256), got {type(model).__name__}")
        self.model, self.limits = model, limits
        self._decoder = Decoder(model, limits.slots, prefill_chunk=limits.prefill_chunk, capture=capture)
        self._reader = Reader(model, limits.prefill_chunk, capture=capture, together=_PROMPTS_TOGETHER)
        self.channels = self._warm_up()
        self._lock = threading.Condition()
        self._inbox: deque[Ticket] = deque()
        self._in_flight = 0
        self._stale = False  # a request was cancelled and may still be somewhere
        self._open, self._stopping = True, False
        self._reading: deque[Prompt] = deque()
        self._steps_since_pass = 0
        self._waiting: deque[Text] = deque()
        self._slots: dict[int, Text] = {}
        self._events: dict[Ticket, list[Event]] = {}
        self._left: dict[Ticket, int] = {}
        self._thread: threading.Thread | None = None

    # What other threads call.

    def submit(self, ticket: Ticket) -> None:
        """Take on a request.

        Raises:
            RequestError: 429 where there is no room now, 503 where the engine has stopped.
        """
        with self._lock:
            if not self._open:
                raise unavailable("the server is shutting down or has failed")
            if self._in_flight + ticket.sequences > self.limits.capacity:
                raise full(
                    f"the server is busy with {self._in_flight} of {self.limits.capacity} sequences; try again later"
                )
            self._in_flight += ticket.sequences
            self._inbox.append(ticket)
            self._lock.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, wherever it is; of one that is done nothing is left to forget."""
        with self._lock:
            ticket.cancelled = self._stale = True
            self._lock.notify()

    @property
    def alive(self) -> bool:
        """False once it takes nothing on any more."""
        return self._open

    @property
    def in_flight(self) -> int:
        """Sequences that are in the engine."""
        return self._in_flight

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._slots)

    def start(self) -> None:
        """Work until :meth:`stop`."""
        self._thread = threading.Thread(target=self._work, name="sma-engine", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop after this round; what was not done fails.

        Returns:
            How many sequences that were.
        """
        with self._lock:
            self._open, self._stopping = False, True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        cut = self._in_flight
        self._fail_all("the server is shutting down")
        return cut

    # The thread of the engine.

    def _work(self) -> None:
        device = self.model.embedding.weight.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a matter of each thread; kernels are launched on the current one
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._stopping or self._stale or bool(self._inbox) or self._busy)
                    if self._stopping:
                        return
                self.round()
        except Exception:
            log.exception("the engine failed")
            with self._lock:
                self._open = False
            self._fail_all("the server failed; its log says why")

    @property
    def _busy(self) -> bool:
        return bool(self._reading or self._waiting or self._slots)

    def round(self) -> None:
        """Read, seat, step, and tell what happened. For the engine's own thread, or instead of it."""
        self._take_in()
        self._read_some()
        self._seat()
        self._step()
        self._tell()

    def _take_in(self) -> None:
        with self._lock:
            new, self._inbox = self._inbox, deque()
            stale, self._stale = self._stale, False
        for ticket in new:
            self._left[ticket] = ticket.sequences
            self._reading.extend(ticket.prompts)
        if stale:
            for ticket in [ticket for ticket in self._left if ticket.cancelled]:
                self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        """Free what a request holds."""
        self._reading = deque(prompt for prompt in self._reading if prompt.ticket is not ticket)
        self._waiting = deque(text for text in self._waiting if text.ticket is not ticket)
        for slot in [slot for slot, text in self._slots.items() if text.ticket is ticket]:
            self._leave(slot)
        self._events.pop(ticket, None)
        self._release(self._left.pop(ticket, 0))

    def _release(self, sequences: int) -> None:
        with self._lock:
            self._in_flight -= sequences

    def _leave(self, slot: int) -> Text:
        self._decoder.leave(slot)
        return self._slots.pop(slot)

    def _say(self, ticket: Ticket, event: Event) -> None:
        self._events.setdefault(ticket, []).append(event)

    def _tell(self) -> None:
        events, self._events = self._events, {}
        for ticket, each in events.items():
            ticket.tell(each)

    def _finish(self, text: Text, reason: str, cut: int) -> None:
        ticket = text.ticket
        self._say(ticket, Finished(text.number, reason, cut))
        self._left[ticket] -= 1
        if not self._left[ticket]:
            del self._left[ticket]
        self._release(1)

    def _fail(self, ticket: Ticket, message: str) -> None:
        self._forget(ticket)
        self._say(ticket, Failed(message))

    def _fail_all(self, message: str) -> None:
        self._take_in()
        for ticket in list(self._left):
            self._fail(ticket, message)
        self._tell()

    # Prompts.

    def _read_some(self) -> None:
        chunk = left = self.limits.prefill_chunk
        while self._reading and left > 0:
            rows = self._pass_of(self._reading[0]).rows
            steps = _STEPS_IN_NO_HURRY if self._waiting else _STEPS_A_PASS if self._slots else 0
            if len(self._reading) < rows and self._steps_since_pass < steps:
                return
            read = self._read_together(self._next())
            self._steps_since_pass = 0
            left -= chunk if rows > 1 else max(read, chunk // _PROMPTS_A_ROUND)

    def _next(self) -> list[Prompt]:
        """The first prompt, and those behind it that its pass has room for; the others keep their order."""
        own = self._pass_of(self._reading[0])
        taken, left = list[Prompt](), list[Prompt]()
        while self._reading and len(taken) < own.rows:
            prompt = self._reading.popleft()
            (taken if self._pass_of(prompt) == own else left).append(prompt)
        self._reading.extendleft(reversed(left))
        return taken

    def _pass_of(self, prompt: Prompt) -> Pass:
        return self._reader.pass_of(min(len(prompt.tokens) - prompt.at, self.limits.prefill_chunk))

    def _read_together(self, prompts: list[Prompt]) -> int:
        """A piece of each, and how many tokens these were."""
        try:
            read = self._read(prompts)
        except Exception:
            if len(prompts) > 1:  # whose fault it is shows when each is read alone; a request fails as a whole
                return sum(self._read_together([prompt]) for prompt in prompts if prompt.ticket in self._left)
            log.exception("a prompt of %d tokens cannot be read", len(prompts[0].tokens))
            self._fail(prompts[0].ticket, "the prompt could not be read; the server's log says why")
            return 0
        for prompt in prompts:
            if prompt.at < len(prompt.tokens):
                self._reading.append(prompt)
            else:
                self._begin(prompt)
        return read

    @torch.no_grad()
    def _read(self, prompts: list[Prompt]) -> int:
        """The same, if nothing goes wrong; if something does, nothing has happened."""
        pieces = [prompt.tokens[prompt.at : prompt.at + self.limits.prefill_chunk] for prompt in prompts]
        tokens = [torch.tensor([list(piece)]) for piece in pieces]
        states = [self._reader.beginning() if prompt.state is None else prompt.state for prompt in prompts]
        curious = any(prompt.ticket.wish.activations for prompt in prompts)
        read = self._reader.read_pieces(tokens, states, routings=curious)
        told = [self._told_of(*each) for each in zip(prompts, tokens, read, strict=True)]
        for prompt, piece, out, events in zip(prompts, pieces, read, told, strict=True):
            prompt.state, prompt.last = out.state, out.logits
            prompt.at += len(piece)
            for event in events:
                self._say(prompt.ticket, event)
        return sum(map(len, pieces))

    def _told_of(self, prompt: Prompt, tokens: Tensor, out: Piece) -> list[Event]:
        """What is wanted of a piece ``(1, L)`` of a prompt."""
        wish, events = prompt.ticket.wish, list[Event]()
        if wish.of_prompt and wish.likelihoods is not None:
            own = tokens[0].to(out.x.device)
            found = self._likelihoods_of(self.model.logits(out.x[0]), prompt.last, own, wish.likelihoods)
            events.extend(Read(text.number, found) for text in prompt.texts)
        if wish.activations:
            decisions = {name: Decision(r.active[0], r.confidence[0]) for name, r in out.routings.items()}
            for i, row in enumerate(_rows(decisions, tokens.shape[1])):
                at = prompt.at + i
                events.extend(Activated(text.number, at, prompt.tokens[at], *row) for text in prompt.texts)
        return events

    def _likelihoods_of(
        self, logits: Tensor, before: Tensor | None, tokens: Tensor, most: int
    ) -> tuple[Likelihood | None, ...]:
        """Of the tokens ``(L,)`` of a piece: the logits before each are those of the token in front of it."""
        first: list[Likelihood | None] = [None] if before is None else [*likelihoods(before, tokens[:1], most)]
        return (*first, *likelihoods(logits[:-1], tokens[1:], most))

    def _begin(self, prompt: Prompt) -> None:
        for text in prompt.texts:
            if prompt.ticket.wish.max_tokens == 0:
                self._finish(text, "length", 0)
            else:
                text.state, text.logits = prompt.state, prompt.last
                self._waiting.append(text)

    # Texts.

    def _seat(self) -> None:
        """Slots to those that wait, those of texts that have had their turn included."""
        served = [slot for slot, text in self._slots.items() if text.since >= self.limits.quantum]
        for slot in served[: max(0, len(self._waiting) - self._decoder.free)]:
            state, logits = self._decoder.read(slot), self._decoder.logits[slot].clone()
            text = self._leave(slot)
            text.state, text.logits, text.since = state, logits, 0
            self._waiting.append(text)
        while self._waiting and self._decoder.free:
            text = self._waiting.popleft()
            assert text.state is not None
            (slot,) = self._decoder.resume(text.state, text.logits, checked=True)
            text.state = text.logits = None
            self._slots[slot] = text

    @torch.no_grad()
    def _step(self) -> None:
        if not self._slots:
            return
        self._steps_since_pass += 1
        slots = sorted(self._slots)
        texts = [self._slots[slot] for slot in slots]
        logits = self._decoder.logits[slots]
        drawn = draw(logits, [text.sampling for text in texts])
        asked = [text.ticket.wish.likelihoods for text in texts]
        most = max((n for n in asked if n is not None), default=None)
        told = likelihoods(logits, drawn, most) if most is not None else [None] * len(slots)
        tokens: dict[int, int] = {}
        done: dict[int, tuple[str, int]] = {}
        for slot, text, token, wanted, likelihood in zip(slots, texts, drawn.tolist(), asked, told, strict=True):
            text.written.append(token)
            text.since += 1
            own = None if wanted is None or likelihood is None else likelihood._replace(top=likelihood.top[:wanted])
            self._say(text.ticket, Written(text.number, token, own))
            end = _end_of(text)
            if end is not None:
                done[slot] = end
            # The last token is stepped only where somebody wants to know what it activates.
            if end is None or text.ticket.wish.activations:
                tokens[slot] = token
        if tokens:
            self._decoder.step(tokens)
            self._tell_activations(tokens)
        for slot, (reason, cut) in done.items():
            self._finish(self._leave(slot), reason, cut)

    def _tell_activations(self, tokens: dict[int, int]) -> None:
        curious = [slot for slot in tokens if self._slots[slot].ticket.wish.activations]
        if not curious:
            return
        rows = list(_rows(self._decoder.decisions, self.limits.slots))
        for slot in curious:
            text = self._slots[slot]
            position = text.read + len(text.written) - 1
            self._say(text.ticket, Activated(text.number, position, tokens[slot], *rows[slot]))

    def _warm_up(self) -> list[str]:
        """A few tokens, so that no client waits for what the first calls set up; the channels."""
        self._reader.warm_up()
        for _ in range(WARMUP + 2):
            slot = self._decoder.acquire()
            self._decoder.step({slot: 0})
            self._decoder.leave(slot)
        return [
            name if decision.active.shape[-1] == 1 else f"{name}[{m}]"
            for name, decision in self._decoder.decisions.items()
            for m in range(decision.active.shape[-1])
        ]


def _end_of(text: Text) -> tuple[str, int] | None:
    wish = text.ticket.wish
    cut = ends_with_stop(text.written, wish.stops)
    if cut:
        return "stop", cut
    return ("length", 0) if len(text.written) >= wish.max_tokens else None


def _rows(decisions: Mapping[str, Decision], count: int) -> Iterator[tuple[tuple[bool, ...], tuple[float, ...]]]:
    """For each of ``count`` rows, who was active and with which confidence, over all modules of all layers."""
    each = list(decisions.values())
    if not each:
        yield from [((), ())] * count
        return
    active = torch.cat([decision.active for decision in each], -1).tolist()
    confidence = torch.cat([decision.confidence.float().nan_to_num() for decision in each], -1).tolist()
    for one, other in zip(active, confidence, strict=True):
        yield tuple(one), tuple(round(number, 3) for number in other)

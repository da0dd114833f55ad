"""Continuous batching: prompts are prefilled in chunks between decoding steps, and sequences take turns in slots."""

from __future__ import annotations

import logging
import threading
from collections import deque

import torch

from sma.errors import ConfigError
from sma.runtime.captured_function import WARMUP
from sma_models.inference.activations import activation_rows, channel_names
from sma_models.inference.batch_prefiller import BatchPrefiller
from sma_models.inference.decoder import Decoder
from sma_models.inference.limits import EngineLimits
from sma_models.inference.messages import (
    EngineFull,
    EngineStopped,
    Event,
    GenerationRequest,
    RequestFailed,
    SequenceFinished,
    TokenActivations,
    TokenGenerated,
)
from sma_models.inference.prompt_queue import PromptQueue, prefill_next_chunks
from sma_models.inference.sampling import draw, likelihoods
from sma_models.inference.sequences import GeneratedSequence, Prompt, prompts_of
from sma_models.language_model import LanguageModel

_SHORT_PROMPTS_PER_ROUND = 8
"""The most single prompts that are prefilled between two steps: each costs a pass, however short."""
_ROWS = 4
"""Whole chunks in one captured pass, and more of shorter ones; each row has a state in memory."""
_STEPS_BEFORE_PARTIAL_PASS, _STEPS_WITH_QUEUE = 8, 32
"""Decoding steps before a pass with rows to spare, which costs as much as a full one, and as much as several steps.
The second number holds while sequences wait for a slot: an earlier prefill would generate nothing sooner.
"""

log = logging.getLogger(__name__)


class Engine:
    """Generates the sequences of many requests at once, in a thread of its own.

    A *round* prefills up to ``prefill_chunk`` tokens of the waiting prompts, a chunk of each in turn, so that a long
    prompt does not stall the others; gives free slots to waiting sequences; and takes one decoding step of all
    sequences that have a slot.

    Where chunks of several prompts are prefilled in one pass, a round has one pass at most: of the first prompt, and of
    those behind it whose chunks have the same shape. While sequences are decoded, a pass for few prompts is deferred
    for a few steps. Where sequences wait for a slot, one that has had its own for ``quantum`` tokens goes to the end of
    the queue: its state has a constant size and is read and written without changing a bit.

    Args:
        model: a language model of bytes in evaluation mode.
        limits: slots, queue, quantum and chunk.
        capture: False never captures a CUDA graph.

    Attributes:
        channels: the names of the layers that decide, in the order in which activations are reported; a layer of
            several modules appears once for each, as ``name[0]``, ``name[1]``.

    Raises:
        ConfigError: the model is not a language model of bytes, or is in training mode.
        StreamingError: the model cannot stream; the message says why.
    """

    def __init__(self, model: LanguageModel, limits: EngineLimits, *, capture: bool = True) -> None:
        if not isinstance(model, LanguageModel) or model.vocab_size != 256:
            raise ConfigError(f"model: must be a language model of bytes (vocab_size 256), got {type(model).__name__}")
        self.model, self.limits = model, limits
        self._decoder = Decoder(model, limits.slots, prefill_chunk=limits.prefill_chunk, capture=capture)
        self._prefiller = BatchPrefiller(model, limits.prefill_chunk, rows=_ROWS, capture=capture)
        self.channels = self._warm_up()
        self._lock = threading.Condition()
        self._inbox: deque[GenerationRequest] = deque()
        self._in_flight = 0
        self._any_cancelled = False
        self._open, self._stopping = True, False
        self._prompts = PromptQueue(self._prefiller)
        self._steps_since_prefill = 0
        self._queue: deque[GeneratedSequence] = deque()
        self._slots: dict[int, GeneratedSequence] = {}
        self._events: dict[GenerationRequest, list[Event]] = {}
        self._unfinished: dict[GenerationRequest, int] = {}
        self._thread: threading.Thread | None = None

    # Called by other threads.

    def submit(self, request: GenerationRequest) -> None:
        """Accept a request.

        Raises:
            EngineFull: its sequences would be more than the limits allow at a time.
            EngineStopped: the engine was stopped or has failed.
        """
        with self._lock:
            if not self._open:
                raise EngineStopped("engine: accepts no requests any more, it was stopped or has failed")
            capacity = self.limits.capacity
            if self._in_flight + request.sequences > capacity:
                raise EngineFull(
                    f"engine: must hold at most {capacity} sequences, holds {self._in_flight}, got "
                    f"{request.sequences} more; try again later"
                )
            self._in_flight += request.sequences
            self._inbox.append(request)
            self._lock.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Discard a request, wherever it is. A finished request is already gone."""
        with self._lock:
            request.cancelled = self._any_cancelled = True
            self._lock.notify()

    @property
    def alive(self) -> bool:
        """Whether it accepts requests."""
        return self._open

    @property
    def in_flight(self) -> int:
        """Sequences of accepted requests that have not ended."""
        return self._in_flight

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._slots)

    def start(self) -> None:
        """Work in a thread until :meth:`stop`."""
        self._thread = threading.Thread(target=self._work, name="sma-engine", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop after this round; unfinished requests fail.

        Returns:
            How many sequences were unfinished.
        """
        with self._lock:
            self._open, self._stopping = False, True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        unfinished = self._in_flight
        self._fail_all("the engine was stopped before the request was finished")
        return unfinished

    # The thread of the engine.

    def _work(self) -> None:
        device = self.model.embedding.weight.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own current device, on which kernels are launched
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(
                        lambda: self._stopping or self._any_cancelled or bool(self._inbox) or self._busy
                    )
                    if self._stopping:
                        return
                self.round()
        except Exception:
            log.exception("the engine failed")
            with self._lock:
                self._open = False
            self._fail_all("the engine failed; its log says why")

    @property
    def _busy(self) -> bool:
        return bool(self._prompts or self._queue or self._slots)

    def round(self) -> None:
        """Prefill, assign slots, take a step, and deliver the events; by the engine's thread, or without one."""
        self._accept()
        self._prefill()
        self._assign_slots()
        self._step()
        self._deliver()

    # Requests.

    def _accept(self) -> None:
        """Take new requests out of the inbox, and discard the cancelled ones."""
        with self._lock:
            new, self._inbox = self._inbox, deque()
            any_cancelled, self._any_cancelled = self._any_cancelled, False
        for request in new:
            self._unfinished[request] = request.sequences
            self._prompts.add(prompts_of(request))
        if any_cancelled:
            for request in [request for request in self._unfinished if request.cancelled]:
                self._discard(request)

    def _discard(self, request: GenerationRequest) -> None:
        """Free what a request holds."""
        self._prompts.discard(request)
        self._queue = deque(sequence for sequence in self._queue if sequence.request is not request)
        for slot in [slot for slot, sequence in self._slots.items() if sequence.request is request]:
            self._leave(slot)
        self._events.pop(request, None)
        self._release(self._unfinished.pop(request, 0))

    def _release(self, sequences: int) -> None:
        with self._lock:
            self._in_flight -= sequences

    def _emit(self, request: GenerationRequest, *events: Event) -> None:
        self._events.setdefault(request, []).extend(events)

    def _deliver(self) -> None:
        events, self._events = self._events, {}
        for request, each in events.items():
            request.on_events(each)

    def _finish(self, sequence: GeneratedSequence, reason: str, stop_bytes: int) -> None:
        request = sequence.request
        self._emit(request, SequenceFinished(sequence.number, reason, stop_bytes))
        self._unfinished[request] -= 1
        if not self._unfinished[request]:
            del self._unfinished[request]
        self._release(1)

    def _fail(self, request: GenerationRequest, message: str) -> None:
        self._discard(request)
        self._emit(request, RequestFailed(message))

    def _fail_all(self, message: str) -> None:
        self._accept()
        for request in list(self._unfinished):
            self._fail(request, message)
        self._deliver()

    # Prefill.

    def _prefill(self) -> None:
        """Prefill chunks of the waiting prompts, at most as many tokens as one chunk, or one pass of several rows."""
        chunk = left = self.limits.prefill_chunk
        while self._prompts and left > 0:
            rows = self._prompts.next_shape().rows
            steps = _STEPS_WITH_QUEUE if self._queue else _STEPS_BEFORE_PARTIAL_PASS if self._slots else 0
            if len(self._prompts) < rows and self._steps_since_prefill < steps:
                return
            tokens = self._prefill_batch(self._prompts.take())
            self._steps_since_prefill = 0
            left -= chunk if rows > 1 else max(tokens, chunk // _SHORT_PROMPTS_PER_ROUND)

    def _prefill_batch(self, prompts: list[Prompt]) -> int:
        """Prefill the next chunk of each prompt; returns the number of tokens."""
        before = [prompt.remaining for prompt in prompts]
        try:
            events = prefill_next_chunks(self._prefiller, prompts)
        except Exception:
            if len(prompts) > 1:  # alone, only the prompt that causes the error fails, and with it its whole request
                return sum(self._prefill_batch([prompt]) for prompt in prompts if prompt.request in self._unfinished)
            log.exception("a prompt of %d tokens cannot be prefilled", len(prompts[0].tokens))
            self._fail(prompts[0].request, "the prompt could not be prefilled; the log of the engine says why")
            return 0
        for prompt, each in zip(prompts, events, strict=True):
            if each:
                self._emit(prompt.request, *each)
            if prompt.remaining:
                self._prompts.add([prompt])
            else:
                self._start_sequences(prompt)
        return sum(before) - sum(prompt.remaining for prompt in prompts)

    def _start_sequences(self, prompt: Prompt) -> None:
        for sequence in prompt.sequences:
            if prompt.request.options.max_tokens == 0:
                self._finish(sequence, "length", 0)
            else:
                sequence.state, sequence.logits = prompt.state, prompt.logits
                self._queue.append(sequence)

    # Decoding.

    def _leave(self, slot: int) -> GeneratedSequence:
        self._decoder.leave(slot)
        return self._slots.pop(slot)

    def _assign_slots(self) -> None:
        """Give slots to waiting sequences: free ones, and those of sequences that have used up their quantum."""
        used_up = [slot for slot, sequence in self._slots.items() if sequence.since_slot >= self.limits.quantum]
        for slot in used_up[: max(0, len(self._queue) - self._decoder.free)]:
            state, logits = self._decoder.read(slot), self._decoder.logits[slot].clone()
            sequence = self._leave(slot)
            sequence.state, sequence.logits, sequence.since_slot = state, logits, 0
            self._queue.append(sequence)
        while self._queue and self._decoder.free:
            sequence = self._queue.popleft()
            assert sequence.state is not None
            (slot,) = self._decoder.resume(sequence.state, sequence.logits, checked=True)
            sequence.state = sequence.logits = None
            self._slots[slot] = sequence

    @torch.no_grad()
    def _step(self) -> None:
        """Draw a token of every sequence that has a slot, and take a decoding step."""
        if not self._slots:
            return
        self._steps_since_prefill += 1
        slots = sorted(self._slots)
        sequences = [self._slots[slot] for slot in slots]
        logits = self._decoder.logits[slots]
        drawn = draw(logits, [sequence.sampling for sequence in sequences])
        wanted = [sequence.request.options.likelihoods for sequence in sequences]
        most = max((count for count in wanted if count is not None), default=None)
        found = likelihoods(logits, drawn, most) if most is not None else [None] * len(slots)
        tokens: dict[int, int] = {}
        ended: dict[int, tuple[str, int]] = {}
        for slot, sequence, token, count, likelihood in zip(
            slots, sequences, drawn.tolist(), wanted, found, strict=True
        ):
            sequence.generated.append(token)
            sequence.since_slot += 1
            own = None if count is None or likelihood is None else likelihood._replace(top=likelihood.top[:count])
            self._emit(sequence.request, TokenGenerated(sequence.number, token, own))
            end = sequence.end()
            if end is not None:
                ended[slot] = end
            # The last token takes a step only if its activations are wanted.
            if end is None or sequence.request.options.activations:
                tokens[slot] = token
        if tokens:
            self._decoder.step(tokens)
            self._emit_activations(tokens)
        for slot, (reason, stop_bytes) in ended.items():
            self._finish(self._leave(slot), reason, stop_bytes)

    def _emit_activations(self, tokens: dict[int, int]) -> None:
        slots = [slot for slot in tokens if self._slots[slot].request.options.activations]
        if not slots:
            return
        rows = list(activation_rows(self._decoder.decisions, self.limits.slots))
        for slot in slots:
            sequence = self._slots[slot]
            position = sequence.prompt_tokens + len(sequence.generated) - 1
            event = TokenActivations(sequence.number, position, tokens[slot], *rows[slot])
            self._emit(sequence.request, event)

    def _warm_up(self) -> list[str]:
        """Process a few tokens, so that no request takes the time of first calls; returns the channels."""
        self._prefiller.warm_up()
        for _ in range(WARMUP + 2):
            slot = self._decoder.acquire()
            self._decoder.step({slot: 0})
            self._decoder.leave(slot)
        return channel_names(self._decoder.decisions)

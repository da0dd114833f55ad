"""The messages of the engine: requests go in, events come out. They know nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sma.errors import SMAError
from sma_models.inference.sampling import Likelihood, Sampling


class EngineFull(SMAError):  # noqa: N818  # what happened, as `queue.Full`
    """The engine holds as many sequences as it may; the request can be submitted again later."""


class EngineStopped(SMAError):  # noqa: N818
    """The engine accepts no requests any more, because it was stopped or has failed."""


class PromptPrefilled(NamedTuple):
    """A chunk of the prompt of a sequence was prefilled.

    Attributes:
        sequence: its number in the request.
        likelihoods: of each token of the chunk, None for the first token of the prompt.
    """

    sequence: int
    likelihoods: tuple[Likelihood | None, ...]


class TokenGenerated(NamedTuple):
    """A sequence got a new token."""

    sequence: int
    token: int
    likelihood: Likelihood | None


class TokenActivations(NamedTuple):
    """Which modules a token activated, in the order of ``Engine.channels``, and with which confidence."""

    sequence: int
    position: int
    token: int
    active: tuple[bool, ...]
    confidence: tuple[float, ...]


class SequenceFinished(NamedTuple):
    """A sequence has ended.

    Attributes:
        sequence: its number in the request.
        reason: ``stop`` or ``length``.
        stop_bytes: how many bytes at its end are the stop string.
    """

    sequence: int
    reason: str
    stop_bytes: int = 0


class RequestFailed(NamedTuple):
    """The engine gave up the whole request."""

    message: str


Event = PromptPrefilled | TokenGenerated | TokenActivations | SequenceFinished | RequestFailed


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What all sequences of one request have in common.

    Attributes:
        max_tokens: the most tokens to generate; 0 only prefills.
        stops: strings that end a sequence.
        likelihoods: how many of the most likely tokens are reported with each token; None reports none.
        prompt_likelihoods: report the likelihoods of the prompt's tokens too.
        activations: report which modules each token activated, the prompt's included.
    """

    max_tokens: int
    stops: tuple[bytes, ...] = ()
    likelihoods: int | None = None
    prompt_likelihoods: bool = False
    activations: bool = False


class GenerationRequest:
    """A request for sequences after some prompts.

    Args:
        options: of every sequence.
        prompts: each as bytes, with one :class:`~sma_models.inference.sampling.Sampling` for each of its sequences.
        on_events: called with the events of a round, by the thread of the engine; must not block.

    Attributes:
        sequences: how many there are; events number them from 0, in the order of the prompts.
        cancelled: set by ``Engine.cancel``.
    """

    def __init__(
        self,
        options: RequestOptions,
        prompts: Sequence[tuple[bytes, Sequence[Sampling]]],
        on_events: Callable[[list[Event]], None],
    ) -> None:
        self.options, self.prompts, self.on_events = options, prompts, on_events
        self.sequences = sum(len(samplings) for _, samplings in prompts)
        self.cancelled = False

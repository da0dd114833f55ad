"""What the engine works on, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from sma_models.inference.sampling import Likelihood, Sampling
from sma_models.stack import StackState


class Read(NamedTuple):
    """A piece of the prompt of a sequence was read.

    Attributes:
        sequence: its number in the request.
        likelihoods: of each token of the piece, None for the first token of all; empty unless they were asked for.
    """

    sequence: int
    likelihoods: tuple[Likelihood | None, ...]


class Written(NamedTuple):
    """A token was written."""

    sequence: int
    token: int
    likelihood: Likelihood | None


class Activated(NamedTuple):
    """Which modules a token activated, see ``Engine.channels``, and with which confidence."""

    sequence: int
    position: int
    token: int
    active: tuple[bool, ...]
    confidence: tuple[float, ...]


class Finished(NamedTuple):
    """A sequence is done: ``stop`` or ``length``; the last ``cut`` bytes are the stop string."""

    sequence: int
    reason: str
    cut: int = 0


class Failed(NamedTuple):
    """The whole request came to nothing."""

    message: str


Event = Read | Written | Activated | Finished | Failed


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the texts of one request have in common.

    Attributes:
        max_tokens: to write, at most; 0 only reads.
        stops: strings that end a text.
        likelihoods: how many of the most likely tokens are told with each token; None tells nothing.
        of_prompt: tell the likelihoods of the prompt's tokens too.
        activations: tell which modules each token activated, the prompt's included.
    """

    max_tokens: int
    stops: tuple[bytes, ...] = ()
    likelihoods: int | None = None
    of_prompt: bool = False
    activations: bool = False


class Ticket:
    """One request on its way through the engine.

    Args:
        wish: what is wanted of every sequence.
        prompts: bytes, and for each the ways in which texts that follow it are drawn.
        tell: is given the events of a round, from the thread of the engine; must not block.
    """

    def __init__(
        self, wish: Wish, prompts: Sequence[tuple[bytes, Sequence[Sampling]]], tell: Callable[[list[Event]], None]
    ) -> None:
        self.wish, self.tell = wish, tell
        self.cancelled = False
        self.prompts: list[Prompt] = []
        count = 0
        for tokens, drawn in prompts:
            rows = [Text(self, count + i, len(tokens), each) for i, each in enumerate(drawn)]
            self.prompts.append(Prompt(self, tokens, rows))
            count += len(rows)
        self.sequences = count


@dataclass(eq=False)
class Text:
    """A sequence that is being written.

    Attributes:
        ticket: of its request.
        number: among the sequences of the request.
        read: tokens of its prompt.
        sampling: how its tokens are drawn.
        written: bytes so far.
        since: how many of them since it has its slot.
        state: while it has no slot, where it stands,
        logits: and what follows there.
    """

    ticket: Ticket
    number: int
    read: int
    sampling: Sampling
    written: bytearray = field(default_factory=bytearray)
    since: int = 0
    state: StackState | None = None
    logits: Tensor | None = None


@dataclass(eq=False)
class Prompt:
    """A prompt that is being read, up to ``at``, for the texts that will follow it."""

    ticket: Ticket
    tokens: bytes
    texts: list[Text]
    at: int = 0
    state: StackState | None = None
    last: Tensor | None = None

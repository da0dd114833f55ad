"""The sequences and prompts of requests, while they are in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sma_models.inference.messages import GenerationRequest
from sma_models.inference.sampling import Sampling
from sma_models.inference.stop_strings import stop_length
from sma_models.stack import StackState


@dataclass(eq=False)
class GeneratedSequence:
    """A sequence that is being generated.

    Attributes:
        request: that it belongs to.
        number: among the sequences of the request.
        prompt_tokens: the length of its prompt.
        sampling: how its tokens are drawn.
        generated: bytes so far.
        since_slot: how many of them since it got its slot.
        state: while it has no slot, its state,
        logits: and those of its next token, ``(V,)`` or ``(1, V)``.
    """

    request: GenerationRequest
    number: int
    prompt_tokens: int
    sampling: Sampling
    generated: bytearray = field(default_factory=bytearray)
    since_slot: int = 0
    state: StackState | None = None
    logits: Tensor | None = None

    def end(self) -> tuple[str, int] | None:
        """Why it ends here, and the length of the stop string at its end; None if it goes on."""
        options = self.request.options
        length = stop_length(self.generated, options.stops)
        if length:
            return "stop", length
        return ("length", 0) if len(self.generated) >= options.max_tokens else None


@dataclass(eq=False)
class Prompt:
    """A prompt whose first ``prefilled`` tokens are prefilled, and the sequences that will follow it.

    Attributes:
        request: that it belongs to.
        tokens: all of it.
        sequences: that get slots after it.
        prefilled: how many tokens.
        state: after these tokens,
        logits: and those of the next token, ``(1, V)``.
    """

    request: GenerationRequest
    tokens: bytes
    sequences: list[GeneratedSequence]
    prefilled: int = 0
    state: StackState | None = None
    logits: Tensor | None = None

    @property
    def remaining(self) -> int:
        """Tokens that are not prefilled yet."""
        return len(self.tokens) - self.prefilled


def prompts_of(request: GenerationRequest) -> list[Prompt]:
    """The prompts of a request, with their sequences."""
    prompts: list[Prompt] = []
    count = 0
    for tokens, samplings in request.prompts:
        sequences = [GeneratedSequence(request, count + i, len(tokens), each) for i, each in enumerate(samplings)]
        prompts.append(Prompt(request, tokens, sequences))
        count += len(sequences)
    return prompts

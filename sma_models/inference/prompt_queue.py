"""The prompts that wait for prefill: which are next, and one pass over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from sma.steppers import Decision
from sma_models.inference.activations import activation_rows
from sma_models.inference.batch_prefiller import BatchPrefiller, BatchShape, PrefilledChunk
from sma_models.inference.messages import Event, GenerationRequest, PromptPrefilled, TokenActivations
from sma_models.inference.sampling import Likelihood, likelihoods
from sma_models.inference.sequences import Prompt


class PromptQueue:
    """Prompts in the order in which their chunks are prefilled.

    Args:
        prefiller: says which chunks fit into one pass.
    """

    def __init__(self, prefiller: BatchPrefiller) -> None:
        self._prefiller = prefiller
        self._prompts: deque[Prompt] = deque()

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Append prompts."""
        self._prompts.extend(prompts)

    def discard(self, request: GenerationRequest) -> None:
        """Remove the prompts of a request."""
        self._prompts = deque(prompt for prompt in self._prompts if prompt.request is not request)

    def next_shape(self) -> BatchShape:
        """The shape of the next pass, which is that of the first prompt."""
        return self._shape_of(self._prompts[0])

    def take(self) -> list[Prompt]:
        """Remove the first prompt, and those behind it that fit into its pass; the others keep their order."""
        shape = self.next_shape()
        taken, others = list[Prompt](), list[Prompt]()
        while self._prompts and len(taken) < shape.rows:
            prompt = self._prompts.popleft()
            (taken if self._shape_of(prompt) == shape else others).append(prompt)
        self._prompts.extendleft(reversed(others))
        return taken

    def _shape_of(self, prompt: Prompt) -> BatchShape:
        return self._prefiller.shape_of(min(prompt.remaining, self._prefiller.chunk))


@torch.no_grad()
def prefill_next_chunks(prefiller: BatchPrefiller, prompts: Sequence[Prompt]) -> list[list[Event]]:
    """Prefill the next chunk of each prompt, in one pass. If it raises, no prompt has changed.

    Returns:
        The events of each prompt.
    """
    chunks = [prompt.tokens[prompt.prefilled : prompt.prefilled + prefiller.chunk] for prompt in prompts]
    tokens = [torch.tensor([list(chunk)]) for chunk in chunks]
    states = [prefiller.initial_state() if prompt.state is None else prompt.state for prompt in prompts]
    routings = any(prompt.request.options.activations for prompt in prompts)
    outs = prefiller.prefill(tokens, states, routings=routings)
    events = [_events_of(prefiller, *each) for each in zip(prompts, tokens, outs, strict=True)]
    for prompt, chunk, out in zip(prompts, chunks, outs, strict=True):
        prompt.state, prompt.logits = out.state, out.logits
        prompt.prefilled += len(chunk)
    return events


def _events_of(prefiller: BatchPrefiller, prompt: Prompt, tokens: Tensor, out: PrefilledChunk) -> list[Event]:
    """What the request wants to know of a chunk ``(1, L)``."""
    options, events = prompt.request.options, list[Event]()
    if options.prompt_likelihoods and options.likelihoods is not None:
        own, logits = tokens[0].to(out.x.device), prefiller.model.logits(out.x[0])
        found = _likelihoods(logits, prompt.logits, own, options.likelihoods)
        events.extend(PromptPrefilled(sequence.number, found) for sequence in prompt.sequences)
    if options.activations:
        decisions = {name: Decision(each.active[0], each.confidence[0]) for name, each in out.routings.items()}
        for position, row in enumerate(activation_rows(decisions, tokens.shape[1]), prompt.prefilled):
            token = prompt.tokens[position]
            events.extend(TokenActivations(each.number, position, token, *row) for each in prompt.sequences)
    return events


def _likelihoods(logits: Tensor, before: Tensor | None, tokens: Tensor, most: int) -> tuple[Likelihood | None, ...]:
    """Of the tokens ``(L,)`` of a chunk: each is predicted by the logits of the token in front of it."""
    first: list[Likelihood | None] = [None] if before is None else [*likelihoods(before, tokens[:1], most)]
    return (*first, *likelihoods(logits[:-1], tokens[1:], most))

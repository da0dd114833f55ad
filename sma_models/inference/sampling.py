"""The next token of every row, each with its own temperature, nucleus and source of randomness."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How the tokens of one sequence are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draw among the fewest tokens that hold this much probability.
        random: one number is drawn from it for each token, so what other sequences do changes nothing.
    """

    temperature: float
    top_p: float
    random: Random


def draw(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Tokens ``(R,)`` int64 for ``logits (R, V)``; where the temperature is 0, exactly their ``argmax``.

    Example:
        >>> greedy = Sampling(0.0, 1.0, Random(0))
        >>> draw(torch.tensor([[0.0, 2.0, 1.0]]), [greedy]).tolist()
        [1]
    """
    best = logits.argmax(-1)
    if all(row.temperature == 0 for row in rows):
        return best
    # A row that is greedy takes part with anything finite.
    numbers = [(row.temperature or 1.0, row.top_p, row.random.random() if row.temperature else 0.5) for row in rows]
    temperature, top_p, uniform = torch.tensor(numbers, dtype=torch.float64, device=logits.device).T[..., None]
    # The largest becomes 0, so that no temperature is too small to divide by.
    probability = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / temperature, -1)
    ranked, order = torch.sort(probability, dim=-1, descending=True, stable=True)
    keep = ranked.cumsum(-1) - ranked < top_p
    total = (ranked * keep).cumsum(-1)
    # The first token whose sum exceeds the drawn number; rounding must not select one behind the last that is kept.
    chosen = (total <= uniform * total[:, -1:]).sum(-1).minimum(keep.sum(-1) - 1)
    drawn = order.gather(-1, chosen[:, None]).squeeze(-1)
    greedy = torch.tensor([row.temperature == 0 for row in rows], device=logits.device)
    return torch.where(greedy, best, drawn)


class Likelihood(NamedTuple):
    """How likely a token was: its log-probability, and the most likely ones in its place with theirs."""

    own: float
    top: tuple[tuple[int, float], ...]


def likelihoods(logits: Tensor, tokens: Tensor, most: int) -> list[Likelihood]:
    """For each row of ``logits (R, V)`` and each of ``tokens (R,)``, at temperature 1, with the ``most`` most likely.

    What is no finite number becomes -9999, as JSON has no infinity.
    """
    log = torch.log_softmax(logits.double(), -1)
    own = log.gather(-1, tokens[:, None]).squeeze(-1)
    value, index = log.topk(most, -1)
    return [
        Likelihood(_finite(mine), tuple((token, _finite(each)) for token, each in zip(tokens_, values, strict=True)))
        for mine, tokens_, values in zip(own.tolist(), index.tolist(), value.tolist(), strict=True)
    ]


def _finite(number: float) -> float:
    return number if number > -9999.0 else -9999.0

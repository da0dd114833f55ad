"""What a language model has to predict in a batch with padding, and how its losses add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.errors import ShapeError

IGNORED = -100
"""The label of a token that is not learned."""


class Targets(NamedTuple):
    """What the columns of a batch predict.

    Attributes:
        labels: ``(B, L)``, -100 where a column predicts nothing.
        n_labels: scalar, the labels as the Trainer counts them for ``num_items_in_batch``.
    """

    labels: Tensor
    n_labels: Tensor

    @staticmethod
    def of(labels: Tensor, logits: Tensor, valid: Tensor | None, shifted: Tensor | None) -> Targets:
        """The targets of a batch. A real token predicts the label of the next real token of its row.

        Padding predicts nothing, wherever it lies, and nothing predicts padding. So the losses of a batch add up to
        those of its rows. The Trainer counts every label but those of column 0, also that of a first token behind
        padding, which nothing predicts.

        Args:
            labels: ``(B, L)``, the tokens themselves, -100 where there is nothing to learn.
            logits: ``(B, L, V)``.
            valid: ``(B, L)`` bool, True on real tokens, or None when all are.
            shifted: ``(B, L)``, the labels of the next tokens, if the caller has shifted them.

        Raises:
            ShapeError: the labels are not those of the columns that have logits.
        """
        given = labels if shifted is None else shifted
        if given.shape != logits.shape[:-1]:
            raise ShapeError(
                f"labels: must be (B, L) = {tuple(logits.shape[:-1])} like the logits, got {tuple(given.shape)}"
            )
        padding = None if valid is None else ~valid.to(given.device)
        if shifted is not None:
            own = shifted if padding is None else shifted.masked_fill(padding, IGNORED)
            return Targets(own, shifted.ne(IGNORED).sum())
        given = given if padding is None else given.masked_fill(padding, IGNORED)
        return Targets(_next(given, padding), given[:, 1:].ne(IGNORED).sum())


def _next(labels: Tensor, padding: Tensor | None) -> Tensor:
    """The label of the next real token, for every real token."""
    if padding is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    length = labels.shape[1]
    columns = torch.arange(length, device=labels.device).masked_fill(padding, length)
    following = F.pad(columns[:, 1:], (0, 1), value=length).flip(1).cummin(1).values.flip(1)
    return F.pad(labels, (0, 1), value=IGNORED).gather(1, following).masked_fill(padding, IGNORED)


def with_auxiliary(loss: Tensor, losses: Mapping[str, Tensor], count: Tensor, num_items: Tensor | int | None) -> Tensor:
    """The loss and the sum of the auxiliary losses, means over a batch like the loss itself.

    The Trainer accumulates gradients over ``num_items`` labels in parts, and divides the loss of a part by all of them;
    so an auxiliary loss counts by the share of the part, which has ``count`` of them.
    """
    if not losses:
        return loss
    total = torch.stack([each.to(loss.device) for each in losses.values()]).sum()
    return loss + (total if num_items is None else total * (count / num_items).to(loss.device))

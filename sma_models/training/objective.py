"""For each kind of data: how a model is given a batch, and how its answer is scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sma.errors import ConfigError
from sma.interfaces import Model
from sma.routing import Routing
from sma_models.classifier import Classifier
from sma_models.language_model import LanguageModel
from sma_models.model_io import ModelOutput
from sma_models.retrieval import Retrieval
from sma_models.training.data.base import Task
from sma_models.training.data.batches import Batch, Kind
from sma_models.training.data.streams import IGNORE

_HEADS: dict[Kind, type[Model]] = {"lm": LanguageModel, "pairs": Retrieval, "tokens": Classifier, "values": Classifier}


@dataclass(frozen=True)
class Score:
    """How a model did on a batch; sums, so that batches of different sizes add up.

    Attributes:
        loss: sum of the cross-entropies in nats.
        correct: how many of the most likely answers were right.
        count: how many predictions there were to make.
    """

    loss: Tensor
    correct: Tensor
    count: Tensor

    def __add__(self, other: Score) -> Score:
        return Score(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    def detach(self) -> Score:
        """The same numbers, cut from the autograd graph."""
        return Score(self.loss.detach(), self.correct, self.count)

    @staticmethod
    def total(scores: Sequence[Score]) -> tuple[float, int, int]:
        """The sums over many batches, the loss in float64; the one place that synchronises with the device."""
        loss, correct, count = (
            torch.stack([getattr(each, name) for each in scores]).cpu() for name in ("loss", "correct", "count")
        )
        return float(loss.double().sum()), int(correct.sum()), int(count.sum())


def check_fit(config: Model.Config, task: Task) -> None:
    """Refuse a model that cannot do the task, before any work.

    Raises:
        ConfigError: the model is for another kind of data, or its vocabulary or number of classes does not fit.
    """
    expected = _HEADS[task.kind]
    if isinstance(config, tuple(head.Config for head in set(_HEADS.values()))) and not isinstance(
        config, expected.Config
    ):
        raise ConfigError(
            f"model: must be a {expected.__name__} for data of the kind {task.kind!r}, got {config.owner.__name__}"
        )
    if hasattr(config, "vocab_size"):
        vocab_size = config.vocab_size
        if (vocab_size is None) != (task.vocab_size is None) or (task.vocab_size or 0) > (vocab_size or 0):
            rule = "must be null (real numbers)" if task.vocab_size is None else f"must be at least {task.vocab_size}"
            raise ConfigError(f"model.vocab_size: {rule} for these data, got {vocab_size}")
    n_classes = getattr(config, "n_classes", None)
    if n_classes is not None and task.n_classes is not None and n_classes < task.n_classes:
        raise ConfigError(f"model.n_classes: must be at least {task.n_classes} for these data, got {n_classes}")


def run_model(
    model: Any,
    batch: Mapping[str, Tensor | None],
    kind: Kind,
    state: Any = None,
    replay: Mapping[str, Routing] | None = None,
) -> ModelOutput:
    """Put a batch through a model.

    Args:
        model: of the kind that :func:`check_fit` accepts.
        batch: as the data set collated it.
        kind: of the data.
        state: for a language model that goes on where the batch before stopped.
        replay: routings whose decisions are taken over.
    """
    # Lengths need no search for the padding, unlike a mask.
    lengths = batch.get("lengths")
    valid = batch.get("valid") if lengths is None else None
    if kind == "pairs":
        tokens = batch["tokens"]
        assert tokens is not None
        masks, counts = ((None, None) if each is None else each.unbind(1) for each in (valid, lengths))
        output = model(tokens[:, 0], tokens[:, 1], valid=masks, lengths=counts, replay=replay)
    elif kind == "lm":
        output = model(batch["tokens"], state, valid=valid, lengths=lengths, replay=replay)
    else:
        output = model(batch[kind], valid=valid, lengths=lengths, replay=replay)
    assert isinstance(output, ModelOutput)
    return output


def score(output: ModelOutput, batch: Mapping[str, Tensor | None], kind: Kind) -> Score:
    """Judge the logits; the loss is differentiable. It is computed in float32 or wider."""
    logits = output.logits
    target = batch["targets" if kind == "lm" else "label"]
    assert target is not None
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logits, target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    with torch.no_grad():
        correct = (logits.argmax(-1) == target).sum()
        count = (target != IGNORE).sum()
    return Score(loss, correct, count)


def quality(kind: Kind, loss: float, accuracy: float) -> dict[str, float]:
    """The usual measure of a task: bits per byte (from ``loss`` in nats) for a language model, else accuracy."""
    return {"bits_per_byte": loss / math.log(2)} if kind == "lm" else {"accuracy": accuracy}


def place(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on ``device``, its real numbers in ``dtype``."""

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=tensor.is_pinned())

    return {name: None if tensor is None else placed(tensor) for name, tensor in batch.items()}

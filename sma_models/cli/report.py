"""What a run activates, on the screen and in its folder ``figures``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from sma.errors import DataError, MissingExtraError
from sma.interfaces import Model
from sma.routing import Routing
from sma.statistics import OperationCount, operations
from sma_models import reports
from sma_models.training.data.base import Task
from sma_models.training.evaluation import batches_of
from sma_models.training.objective import place, run_model
from sma_models.training.recipe import TrainConfig
from sma_models.training.run import Run

SHOWN_BYTES = 4096
"""How much of a text the heat map shows."""
PICTURED_BYTES = 480
"""How much of it the still picture shows."""


@torch.no_grad()
def report(
    run: Run, model: Model, task: Task, config: TrainConfig, console: Console, *, split: str = "test", batches: int = 4
) -> OperationCount | None:
    """Print the activation rate and attention span of each layer and the operations spent, and draw the figures.

    Args:
        run: where the figures go.
        model: in evaluation mode, on the CPU.
        task: its data.
        config: sizes of the batches.
        console: where to print.
        split: which samples to look at.
        batches: how many batches of them, drawn at random.

    Returns:
        The operations of one batch; None when nothing in the model is activated sparsely.
    """
    parameter = next(model.parameters())
    drawn = itertools.islice(batches_of(task, split, config, limit=batches), batches)
    looked_at = [place(batch, parameter.device, parameter.dtype) for batch in drawn]
    routings = [run_model(model, batch, task.kind).routings for batch in looked_at]
    count = None
    if routings[0]:
        console.print(reports.rates_table(routings, model=model))
        count = operations(lambda replay: run_model(model, looked_at[0], task.kind, replay=replay))
        console.print(reports.operations_table(count))
    else:
        console.print("The model has no sparsely activated layer.")
    for path in _figures(run, model, task, split, routings):
        console.print(f"wrote {path}", soft_wrap=True)
    return count


def _figures(run: Run, model: Model, task: Task, split: str, routings: list[Mapping[str, Routing]]) -> list[Path | str]:
    """The figures that were written; a note in place of those that cannot be drawn here."""
    folder = run.figures
    wanted: list[Callable[[], Path]] = []
    if run.metrics.exists():
        wanted.append(lambda: reports.loss_curve(run.metrics, folder / "loss.png"))
    if routings[0]:
        wanted.append(lambda: reports.rates_by_layer(routings, folder / "rates_by_layer.png"))
        if run.metrics.exists():
            wanted.append(lambda: reports.rates_over_training(run.metrics, folder / "rates_over_training.png"))
        text = _text(task, split)
        if text is not None:
            shown = {name: routing.detach() for name, routing in _routings_of(model, task, text).items()}
            some, part = text[:PICTURED_BYTES], {name: _first(r, PICTURED_BYTES) for name, r in shown.items()}
            wanted.append(lambda: reports.text_heat_map(text, shown, folder / "text_heat_map.html"))
            wanted.append(lambda: reports.activation_picture(some, part, folder / "activations.png"))
    done: list[Path | str] = []
    for draw in wanted:
        try:
            done.append(draw())
        except (MissingExtraError, DataError) as error:
            # The rest does not depend on the pictures, which need matplotlib and a log.
            done.append(f"nothing for a figure: {error}")
    return done


def _text(task: Task, split: str) -> bytes | None:
    """The beginning of a text of the task, cut after a line; None if its tokens are no bytes."""
    if task.text is not None:
        text = task.text(split)[:SHOWN_BYTES]
        return text[: text.rfind(b"\n") + 1] or text
    if task.kind == "tokens" and task.vocab_size == 257:
        tokens: Tensor = task.split(split)[0]["tokens"]
        return bytes(tokens.tolist())
    return None


def _routings_of(model: Model, task: Task, text: bytes) -> Mapping[str, Routing]:
    tokens = torch.tensor([list(text)], device=next(model.parameters()).device)
    return run_model(model, {"tokens": tokens, "valid": None}, task.kind).routings


def _first(routing: Routing, length: int) -> Routing:
    part = slice(0, length)
    return Routing(
        routing.active[:, part], routing.confidence[:, part], routing.valid[:, part], routing.position[:, part]
    )

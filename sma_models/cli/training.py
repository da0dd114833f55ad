"""``sma train``, ``sma eval`` and ``sma data``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sma.errors import ConfigError
from sma_models.cli.common import RUNS, RunArgument, RunsOption, extra, find_run, notes, out, split_arguments

if TYPE_CHECKING:
    from sma_models.training.data.base import Task
    from sma_models.training.recipe import Recipe
    from sma_models.training.run import Run

MAY_CHANGE = ("train.device", "train.resident", "train.workers", "train.capture", "data.root")
"""What may change when a run is resumed: the device and the place of the data, not the result."""


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE [KEY=VALUE]...", help="A recipe's name or file, then changes to it.", show_default=False
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the time.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Resume an interrupted run.")] = None,
    runs: RunsOption = RUNS,
) -> int:
    """Train a recipe, for example: sma train lm_stdlib model.n_layers=6 train.steps=2000."""
    recipe_name, overrides = split_arguments(arguments or [])
    with extra("train"):
        from sma_models.training.loop import train as run_training
    opened = (
        _continued(resume, name, recipe_name, overrides, runs) if resume else _new(recipe_name, name, overrides, runs)
    )
    run, recipe, task = opened
    for note in task.notes if task else ():
        notes().print(note, soft_wrap=True)
    notes().print(f"run {run.path}", soft_wrap=True)
    outcome = run_training(run, recipe, task=task, console=notes())
    if outcome.signal is not None:
        print(
            f"stopped after step {outcome.step} of {recipe.train.steps}; go on with: sma train --resume {run.path}",
            file=sys.stderr,
        )
        return 128 + outcome.signal
    assert outcome.summary is not None
    out().print(results_table(outcome.summary))
    sizes = f"{outcome.summary['parameters']:,} parameters, {outcome.summary['training_seconds']} s of training"
    out().print(f"{sizes}; results in {run.path}", soft_wrap=True)
    return 0


def _new(
    recipe_name: str | None, name: str | None, overrides: list[str], runs: Path
) -> tuple[Run, Recipe, Task | None]:
    from sma_models.training import recipe as recipes
    from sma_models.training.loop import open_task
    from sma_models.training.run import Run, check_name

    if recipe_name is None:
        raise ConfigError(
            f"recipe: must be given (known: {', '.join(recipes.recipe_names())}, or a path of a .yaml file), got none"
        )
    recipe = recipes.load_recipe(recipe_name, *overrides)
    check_name(runs / recipes.recipe_name(recipe_name), name)
    task = open_task(recipe)  # before there is a folder: a mistake leaves nothing behind
    return Run.create(runs, recipes.recipe_name(recipe_name), recipe, name), recipe, task


def _continued(
    resume: str, name: str | None, recipe_name: str | None, overrides: list[str], runs: Path
) -> tuple[Run, Recipe, Task | None]:
    from sma_models.training.journal import check_checkpoint
    from sma_models.training.run import check_same

    if name is not None:
        raise ConfigError(f"name: must not be given with --resume, got {name!r}")
    for override in overrides:
        if override.partition("=")[0].strip() not in MAY_CHANGE:
            raise ConfigError(
                f"override: only {', '.join(MAY_CHANGE)} may change when a run is resumed, got {override!r}"
            )
    run = find_run(resume, runs)
    check_same(run, recipe_name)
    recipe = run.recipe(*overrides)
    check_checkpoint(run, recipe.train.checkpoint_every)
    return run, recipe, None


def evaluate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as data.root=.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Judge the model of a run on a split of its data."""
    found = find_run(run, runs)
    with extra("train"):
        from sma_models.training.evaluation import evaluate as judge
        from sma_models.training.loop import device_of, open_task
    recipe = found.recipe(*(overrides or []))
    model = found.model().to(device_of(recipe.train))
    result = judge(model, open_task(recipe), split, recipe.train).as_dict()
    if as_json:
        typer.echo(json.dumps({"run": str(found.path), "split": split, **result}))
    else:
        out().print(results_table({split: result}))


def results_table(summary: dict[str, Any]) -> Table:
    """The results of one or several splits."""
    splits = {name: result for name, result in summary.items() if isinstance(result, dict) and "loss" in result}
    table = Table("split", "loss", "result", "active per layer", "answers")
    for name, result in splits.items():
        quality = (
            f"{result['bits_per_byte']:.3f} bits per byte"
            if "bits_per_byte" in result
            else f"{100 * result['accuracy']:.2f} % right"
        )
        rates = " ".join(f"{100 * rate:.0f}%" for each in result["activation_rate"].values() for rate in each)
        table.add_row(name, f"{result['loss']:.4f}", quality, rates or "-", f"{result['count']:,}")
    return table


def data(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="A recipe's name or file, then changes to it.")
    ],
) -> None:
    """Get the data of a recipe (download and check, or generate) and say what they are."""
    name, overrides = split_arguments(arguments)
    if name is None:
        raise ConfigError(f"recipe: must come first, got {arguments[0]!r}")
    with extra("train"):
        from sma_models.training.objective import check_fit
        from sma_models.training.recipe import load_recipe
    recipe = load_recipe(name, *overrides)
    source = recipe.data.build()
    folder = source.prepare()
    task = source.open(seed=recipe.train.seed)
    check_fit(recipe.model, task)
    if folder is not None:
        out().print(f"in {folder}", soft_wrap=True)
    for note in task.notes:
        out().print(note, soft_wrap=True)
    table = Table("split", "windows" if task.kind == "lm" else "samples", "bytes" if task.text else "")
    for split, samples in task.splits.items():
        size = len(samples)
        table.add_row(split, f"{size:,}", f"{len(task.text(split)):,}" if task.text else "")
    out().print(table)

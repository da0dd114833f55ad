"""A training run from beginning to end, or from a checkpoint to the end."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from sma import __version__
from sma.errors import CheckpointError, ConfigError
from sma.interfaces import Model
from sma.spec.sizes import blueprint
from sma.weights import save
from sma_models.training.callbacks import ProgressBar, Recorder, StopRequest
from sma_models.training.checkpoint import Checkpoint, read_checkpoint
from sma_models.training.data.base import Task
from sma_models.training.data.batching import BatchPlan, loader
from sma_models.training.evaluation import evaluate
from sma_models.training.journal import MetricsFile, cut_back, set_aside
from sma_models.training.module import TrainingModule, parameter_count
from sma_models.training.objective import check_fit
from sma_models.training.recipe import Recipe, TrainConfig
from sma_models.training.run import Run
from sma_models.training.steps import seed_everything

_PRECISION = {"float32": "32-true", "bfloat16": "32-true", "float64": "64-true"}
"""A step casts to bfloat16 by itself, so that this can be captured with it."""


@dataclass(frozen=True)
class Outcome:
    """How :func:`train` ended: the ``summary`` of a finished run, or the ``signal`` that stopped it at ``step``."""

    step: int
    summary: dict[str, Any] | None = None
    signal: int | None = None


def open_task(recipe: Recipe) -> Task:
    """The data of a recipe, checked against its model.

    Raises:
        DataError: files are missing or broken.
        ConfigError: the model does not fit the data.
    """
    task: Task = recipe.data.build().open(seed=recipe.train.seed)
    check_fit(recipe.model, task)
    return task


def build_model(recipe: Recipe) -> Model:
    """The untrained model of a recipe; the weights follow from the seed.

    Raises:
        SizeError: the machine has not enough memory for it.
    """
    blueprint(recipe.model)
    with torch.random.fork_rng(devices=[]):
        seed_everything(recipe.train.seed, -1)
        model: Model = recipe.model.build()
    return model.to(torch.float64) if recipe.train.precision == "float64" else model


def train(run: Run, recipe: Recipe, *, task: Task | None = None, console: Console | None = None) -> Outcome:
    """Train ``run`` from its last checkpoint, or from the beginning where there is none, to the end of its recipe.

    A run that was interrupted, however that happened, goes on as if it had not been: the same losses, on a CPU bit
    for bit.

    Args:
        run: the folder to write to.
        recipe: of the run.
        task: its data, where they are open already.
        console: where the progress is shown.

    Raises:
        ConfigError: the run is finished, or in use; the model does not fit the data.
        DataError: the data are missing or broken.
        CheckpointError: the last checkpoint is not of this recipe.
    """
    if run.finished:
        raise ConfigError(f"{run.path}: must be unfinished to be continued, got a finished run")
    console = console or Console(stderr=True)
    with run.locked():
        task = task or open_task(recipe)
        model = build_model(recipe)
        start = read_checkpoint(run.checkpoint) if run.checkpoint.exists() else None
        if start is not None:
            start.restore_model(model)
            if start.progress.step > recipe.train.steps:
                raise CheckpointError(
                    f"{run.checkpoint}: must be of at most {recipe.train.steps} steps, got {start.progress.step}"
                )
        fit = _fit(run, recipe, task, model, start, console)
        if fit.signal is not None:
            return Outcome(fit.step, signal=fit.signal)
        return Outcome(fit.step, summary=_finish(run, recipe, task, model, fit, console))


@dataclass(frozen=True)
class _Fit:
    """Steps done and seconds spent on them, in all; the signal that ended it; information on how it ran."""

    step: int
    seconds: float
    signal: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def _fit(run: Run, recipe: Recipe, task: Task, model: Model, start: Checkpoint | None, console: Console) -> _Fit:
    plan = recipe.train
    done = start.progress.step if start else 0
    if start is None:
        set_aside(run.metrics)
    cut_back(run.metrics, done)
    run.remove_unfinished()
    if done == plan.steps:
        assert start is not None
        return _Fit(done, start.progress.seconds)
    stop = StopRequest()
    recorder = Recorder(run, task, start, stop)
    module = TrainingModule(model, task.kind, recipe)
    size = None if task.endless else len(task.train)  # type: ignore[arg-type]
    batches = loader(
        task.train,
        BatchPlan(size, plan.part_size, seed=plan.seed),
        start=done * plan.accumulate,
        stop=plan.steps * plan.accumulate,
        source=plan.source(device_of(plan)),
    )
    with _quiet(), stop.restored_afterwards():
        trainer = _trainer(run, recipe, [recorder, ProgressBar(console, recorder, plan.steps, done)], done)
        trainer.fit(module, batches)
    signal = stop.received if module.step < plan.steps else None
    return _Fit(module.step, recorder.seconds, signal, _notes(module, device_of(plan)))


def _notes(module: TrainingModule, device: torch.device) -> dict[str, Any]:
    """How training ran on a GPU."""
    if device.type != "cuda":
        return {}
    notes: dict[str, Any] = {"device": torch.cuda.get_device_name(device)}
    if module.captured is not None:
        steps = module.captured
        notes["graphs"] = steps.why_not or {"captured": steps.captured, "steps_done_again": steps.again}
    return {**notes, "peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20)}


def _trainer(run: Run, recipe: Recipe, callbacks: list[Any], done: int) -> Trainer:
    plan = recipe.train
    board = TensorBoardLogger(run.path, name="tensorboard", version="", purge_step=done + 1 if done else None)
    return Trainer(
        max_epochs=1,
        accelerator="gpu" if plan.device == "cuda" else plan.device,
        devices=1,
        precision=_PRECISION[plan.precision],  # type: ignore[arg-type]
        logger=[MetricsFile(run.metrics), board],
        callbacks=callbacks,
        default_root_dir=run.path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice and announcements stay out of the output; its errors do not."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", message=r".*step\(\) is running without CUDA graph capture")
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _finish(run: Run, recipe: Recipe, task: Task, model: Model, fit: _Fit, console: Console) -> dict[str, Any]:
    """Evaluate the trained model, and write the weights and then the results."""
    model = model.to(device_of(recipe.train))
    started = time.perf_counter()
    results: dict[str, Any] = {}
    for split in [name for name in ("validation", "test") if name in task.splits]:
        with console.status(f"judging on {split}"):
            results[split] = evaluate(model, task, split, recipe.train).as_dict()
    save(model, run.weights)
    summary: dict[str, Any] = {
        "recipe": run.path.parent.name,
        "version": __version__,
        "steps": recipe.train.steps,
        "parameters": parameter_count(model),
        "training_seconds": round(fit.seconds, 1),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        **fit.notes,
        **results,
    }
    run.write_summary(summary)
    return summary


def device_of(config: TrainConfig) -> torch.device:
    """The device on which a recipe runs."""
    if config.device != "auto":
        return torch.device(config.device)
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")

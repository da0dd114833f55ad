"""Callbacks around the steps: records, evaluations, checkpoints, the progress bar, and stopping on a signal."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sma.errors import SMAError
from sma_models.training.checkpoint import Checkpoint, Progress, save_checkpoint
from sma_models.training.data.base import Task
from sma_models.training.evaluation import RateMeter, evaluate
from sma_models.training.module import TrainingModule
from sma_models.training.objective import Score, quality
from sma_models.training.run import Run


class DivergedError(SMAError):
    """The loss is no longer a finite number."""


class StopRequest:
    """Catches SIGINT and SIGTERM, so that training stops after the current step; a second SIGINT interrupts at once.

    Attributes:
        received: number of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def install(self) -> None:
        """Take over the two signals."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self)

    @contextmanager
    def restored_afterwards(self) -> Iterator[None]:
        """Give the signals back at the end."""
        main = threading.current_thread() is threading.main_thread()
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                if main:
                    signal.signal(signum, handler)


class Recorder(Callback):
    """Logs, evaluates and saves after the steps where the recipe asks for it.

    In this order, so that the log is never behind a checkpoint.

    Args:
        run: where to write.
        task: what to evaluate on.
        start: the checkpoint that training goes on from.
        stop: set when training shall end.
    """

    def __init__(self, run: Run, task: Task, start: Checkpoint | None, stop: StopRequest) -> None:
        self.run = run
        self.task = task
        self.start = start
        self.stop = stop
        self.seconds = start.progress.seconds if start else 0.0
        self.latest: dict[str, float] = {}
        self._clock = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the optimiser to where it was."""
        module = _training_module(pl_module)
        if self.start is not None:
            module.step = self.start.progress.step
            self.start.restore_optimiser(trainer.optimizers[0])
        module.wants_norm = lambda step: self._due(step, module.recipe.train.log_every, module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal is answered between two steps."""
        self.stop.install()
        self._clock = time.perf_counter()

    def _due(self, step: int, every: int, module: TrainingModule) -> bool:
        return step == module.recipe.train.steps or (every > 0 and step % every == 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last part of a step."""
        module = _training_module(pl_module)
        train = module.recipe.train
        if (batch_idx + 1) % train.accumulate:
            return
        logs = self._due(module.step, train.log_every, module)
        evaluates = "validation" in self.task.splits and self._due(module.step, train.eval_every, module)
        saves = self._due(module.step, train.checkpoint_every, module)
        if not (logs or evaluates or saves or self.stop.received is not None):
            return  # the device may still be at an earlier step; do not synchronise with it
        module.settle()
        loss = _finite(float(module.loss), module.step)
        self._count_time()
        if logs or evaluates:
            metrics = self._training_metrics(module, loss)
            if evaluates:
                metrics |= self._validation_metrics(module)
                self._clock = time.perf_counter()  # evaluations do not count as time of training
            self._write(trainer, module, metrics)
        trainer.should_stop |= self.stop.received is not None  # it may have come during the evaluation
        if saves or trainer.should_stop:
            save_checkpoint(
                self.run.checkpoint, module.model, trainer.optimizers[0], Progress(module.step, self.seconds)
            )

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def _write(self, trainer: Trainer, module: TrainingModule, metrics: dict[str, float | None]) -> None:
        self.latest = {name: value for name, value in metrics.items() if value is not None}
        for logger in trainer.loggers:
            known = metrics if logger is trainer.loggers[0] else self.latest
            logger.log_metrics(known, step=module.step)  # type: ignore[arg-type]

    def _training_metrics(self, module: TrainingModule, loss: float) -> dict[str, float | None]:
        """The metrics of the last step; the columns of the evaluation exist from the start, still empty."""
        train = module.recipe.train
        assert module.answers is not None
        entropy, correct, count = Score.total([module.answers])
        known = quality(module.batch_kind, entropy / max(count, 1), correct / max(count, 1))
        meter = RateMeter()
        meter.add(module.routings)
        lr = float(module.trainer.optimizers[0].param_groups[0]["lr"])
        metrics: dict[str, float | None] = {"seconds": round(self.seconds, 3), "loss": loss, **known, "lr": lr}
        logs = self._due(module.step, train.log_every, module)
        metrics["gradient_norm"] = float(module.gradient_norm) if logs and module.gradient_norm is not None else None
        metrics |= _rate_columns("rate", meter.rates())
        counts = [routing.overflow for routing in module.routings.values() if routing.overflow is not None]
        if counts:
            metrics["overflow"] = int(torch.cat(counts).sum()) if logs else None
        if "validation" in self.task.splits:
            metrics |= {"validation_loss": None} | {f"validation_{name}": None for name in known}
        return metrics

    def _validation_metrics(self, module: TrainingModule) -> dict[str, float]:
        train = module.recipe.train
        result = evaluate(module.model, self.task, "validation", train, limit=train.eval_batches)
        return {
            "validation_loss": result.loss,
            **{f"validation_{name}": value for name, value in result.quality.items()},
        }


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise DivergedError(
            f"loss: must be finite, got {loss} at step {step}; the last checkpoint is from before. "
            "A lower optimiser.lr may help"
        )
    return loss


def _rate_columns(prefix: str, rates: Mapping[str, list[float]]) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for name, each in rates.items():
        columns |= {f"{prefix}/{name}" + (f".{m}" if len(each) > 1 else ""): rate for m, rate in enumerate(each)}
    return columns


class ProgressBar(Callback):
    """A bar over all steps of the run on a terminal; elsewhere a line at every tenth of the way."""

    def __init__(self, console: Console, recorder: Recorder, steps: int, done: int) -> None:
        self.console = console
        self.recorder = recorder
        self.steps = steps
        self.warned = False
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=done, shown="")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on."""
        module = _training_module(pl_module)
        step = module.step
        tenth = step % max(self.steps // 10, 1) == 0 or step == self.steps
        if (batch_idx + 1) % module.recipe.train.accumulate or not (self.console.is_terminal or tenth):
            return
        shown = describe(self.recorder.latest)
        self.bar.update(self.task, completed=step, shown=shown)
        reason = module.captured.why_not if module.captured else None
        if reason is not None and not self.warned:
            self.console.print(f"without CUDA graphs: {reason}", highlight=False)
            self.warned = True
        if not self.console.is_terminal:
            self.console.print(f"step {step} of {self.steps}{': ' if shown else ''}{shown}", highlight=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self.bar.stop()


def describe(metrics: Mapping[str, float]) -> str:
    """The loss and the quality, for people."""
    names = {"loss": "loss", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}
    parts = [f"{shown} {metrics[name]:.3f}" for name, shown in names.items() if name in metrics]
    rates = [value for name, value in metrics.items() if name.startswith("rate/")]
    if rates:
        parts.append("active " + " ".join(f"{100 * rate:.0f}" for rate in rates[:8]) + " %")
    if metrics.get("overflow"):
        parts.append(f"{metrics['overflow']:,} tokens dropped for lack of capacity")
    return ", ".join(parts)


def _training_module(module: LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module

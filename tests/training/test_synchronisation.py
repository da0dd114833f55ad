"""Training synchronises with the device only where something is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sma_models.training import evaluation, steps
from sma_models.training.evaluation import evaluate
from sma_models.training.loop import Outcome, build_model, open_task
from sma_models.training.module import TrainingModule
from sma_models.training.recipe import load_recipe
from sma_models.training.run import Run

Runner = Callable[..., tuple[Run, Outcome]]

SHAPES_FROM_VALUES = ("nonzero", "masked_select", "_unique", "unique_dim", "repeat_interleave.Tensor")


class Reads(TorchDispatchMode):
    """Counts what would synchronise with a device: values that become numbers, Booleans or shapes of the host.

    A model may do so; what it does is of no concern here, so its forward pass does not count.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        super().__init__()
        self.now = now
        self.paused = 0
        self.seen: Counter[int] = Counter()

    def note(self) -> None:
        if not self.paused:
            self.seen[self.now()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(("_local_scalar_dense", "is_nonzero", "equal", *SHAPES_FROM_VALUES)):
            self.note()
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch, now: Callable[[], int]) -> Iterator[Reads]:
    counter = Reads(now)

    def counted(plain: Any) -> Any:
        def read(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            counter.note()
            return plain(self, *args, **options)

        return read

    for name in ("tolist", "numpy", "cpu"):  # these the dispatcher does not see
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    plain = steps.run_model

    def uncounted(*args: Any, **options: Any) -> Any:
        counter.paused += 1
        try:
            return plain(*args, **options)
        finally:
            counter.paused -= 1

    monkeypatch.setattr(steps, "run_model", uncounted)
    monkeypatch.setattr(evaluation, "run_model", uncounted)
    with counter:
        yield counter


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_training_step_reads_nothing_back(
    clip: str, tiny: str, run_recipe: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 6 and 12 are logged, and 9 is saved; two parts a step, dropout and controllers."""
    modules: list[TrainingModule] = []
    plain = TrainingModule.__init__

    def remembered(self: TrainingModule, *args: Any) -> None:
        plain(self, *args)
        modules.append(self)

    monkeypatch.setattr(TrainingModule, "__init__", remembered)
    plan = ["train.steps=14", "train.log_every=6", "train.checkpoint_every=9", "train.eval_every=0"]
    plan += ["optimiser.algorithm=adamw", f"optimiser.clip={clip}", "train.precision=bfloat16", "train.resident=true"]
    with reads(monkeypatch, lambda: modules[0].step if modules else -1) as counter:
        run_recipe(tiny, *plan)
    during = {step for step in counter.seen if step > 0}
    assert during == {6, 9, 12, 14}


@pytest.mark.parametrize("limit", [None, 2])
def test_an_evaluation_reads_as_often_for_many_batches_as_for_few(
    limit: int | None, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for size in (1, 8):
        recipe = load_recipe(tiny, f"train.eval_batch_size={size}", "train.resident=true")
        task, model = open_task(recipe), build_model(recipe)
        with monkeypatch.context() as patched, reads(patched, lambda: 0) as counter:
            evaluate(model, task, "validation", recipe.train, limit=limit)
        counts.append(counter.seen[0])
    assert counts[0] == counts[1] > 0


def test_the_same_run_however_the_batches_are_made(tiny: str, run_recipe: Runner) -> None:
    """The weights agree bit for bit, on a CPU."""
    plans = ("train.resident=true", "train.resident=false")
    runs = [run_recipe(tiny, "train.steps=6", plan, name=plan[-5:].strip("=")) for plan in plans]
    states = [run.model().state_dict() for run, _ in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert runs[0][1].summary is not None
    assert runs[1][1].summary is not None
    assert runs[0][1].summary["test"] == runs[1][1].summary["test"]


def test_generators_start_from_the_step() -> None:
    def drawn(*place: int) -> list[float]:
        steps.seed_everything(*place)
        return torch.rand(3).tolist()

    expected = drawn(1, 2)
    assert drawn(1, 2) == expected
    assert drawn(1, 2, 1) != expected
    assert drawn(1, 3) != expected
    if torch.cuda.is_available():
        device = torch.device("cuda")
        both = []
        for _ in range(2):
            steps.seed_everything(1, 2, 0, device)
            both.append(torch.rand(3, device=device).tolist())
        assert both[0] == both[1]

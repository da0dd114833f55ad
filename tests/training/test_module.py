"""The Lightning module: losses, accumulation, controllers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sma.errors import SMAError
from sma_models.training.callbacks import DivergedError, describe
from sma_models.training.journal import read_metrics
from sma_models.training.loop import Outcome, build_model, open_task
from sma_models.training.objective import run_model, score
from sma_models.training.optimisation import build_optimiser
from sma_models.training.recipe import load_recipe
from sma_models.training.run import Run
from sma_models.training.steps import Work

Runner = Callable[..., tuple[Run, Outcome]]


def test_the_controller_holds_the_rate(tiny: str, run_recipe: Runner) -> None:
    """Without it, this model's layers are active almost everywhere or nowhere; with it, the rate is at the target."""
    run, _ = run_recipe(tiny, "train.steps=60", "train.batch_size=16", "train.eval_every=0")
    rows = read_metrics(run.metrics)
    for layer in (0, 1):
        last = [row[f"rate/layers.{layer}.activate"] for row in rows[-20:]]
        assert sum(last) / len(last) == pytest.approx(0.4, abs=0.1)
    state = run.model().state_dict()
    assert all(bool(value.abs().sum() > 0) for name, value in state.items() if name.endswith("balance"))


def test_without_a_controller_the_balance_stays(tiny: str, run_recipe: Runner) -> None:
    run, _ = run_recipe(tiny, "train.steps=6", "model.blocks[0].activate.controller=null")
    state = run.model().state_dict()
    balances = [value for name, value in state.items() if name.endswith("balance")]
    assert len(balances) == 2
    assert all(not bool(value.any()) for value in balances)


def test_the_controller_sees_every_part_of_a_step(tiny: str) -> None:
    """Two parts of different rates: the correction is that of their mean, and the next step starts from nothing."""
    recipe = load_recipe(tiny)
    model = build_model(recipe)
    work = Work(model, "lm", recipe, build_optimiser(recipe.optimiser, model.parameters()))
    name = "layers.0.activate"
    routing = run_model(model.eval(), {"tokens": torch.zeros(2, 10, dtype=torch.int64)}, "lm").routings[name]
    for on in (True, False):
        work.count({name: replace(routing, active=torch.full_like(routing.active, on))})
    work.control_rates()
    balance = work.layer(name).configurator.balance
    assert balance.tolist() == pytest.approx([0.5 * (0.4 - 0.5)])
    balance.zero_()
    work.count({name: replace(routing, active=torch.ones_like(routing.active))})
    work.control_rates()
    assert balance.tolist() == pytest.approx([0.5 * (0.4 - 1.0)])


def test_parts_of_a_batch_add_up_to_the_whole(tiny: str, run_recipe: Runner) -> None:
    """Accumulation changes memory, not results (without dropout and controllers, which see the parts)."""
    plain = (
        "model.blocks[0].dropout=0.0",
        "model.dropout=0.0",
        "model.blocks[0].activate.controller=null",
        "train.steps=6",
    )
    exact = ("train.precision=float64",)
    runs = [run_recipe(tiny, *plain, *exact, f"train.accumulate={n}", name=f"in-{n}")[0] for n in (1, 4)]
    whole, parts = ([row["loss"] for row in read_metrics(run.metrics)] for run in runs)
    assert parts == pytest.approx(whole, rel=1e-9)


def test_the_loss_is_that_of_the_model_and_its_parts(tiny: str, run_recipe: Runner) -> None:
    """A rate loss is part of what is logged and trained on; the bits per byte are those of the task alone."""
    base = ("train.steps=6", "model.blocks[0].activate.controller=null")
    run, _ = run_recipe(tiny, *base, "model.blocks[0].activate.rate_loss={target: 0.1, weight: 10.0}", name="loss")
    row = read_metrics(run.metrics)[0]
    assert row["loss"] > row["bits_per_byte"] * 0.6931471805599453 + 0.01


def test_score_counts_what_there_is_to_predict() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [5.0, 0.0]]])
    batch = {"targets": torch.tensor([[0, 0, -100]])}
    result = score(type("Output", (), {"logits": logits})(), batch, "lm")  # type: ignore[arg-type]
    assert (int(result.count), int(result.correct)) == (2, 1)
    expected = -logits[0, :2].log_softmax(-1)[:, 0].sum()
    assert float(result.loss) == pytest.approx(float(expected))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny: str, run_recipe: Runner) -> None:
    with pytest.raises(SMAError) as caught:
        run_recipe(tiny, "optimiser.lr=1e30", "optimiser.clip=null", "optimiser.warmup=0", "train.steps=20", name="hot")
    assert isinstance(caught.value, DivergedError) or "finite" in str(caught.value)


def test_bfloat16_trains(tiny: str, run_recipe: Runner) -> None:
    run, outcome = run_recipe(tiny, "train.precision=bfloat16", "train.steps=6")
    assert outcome.summary is not None
    assert all(value.dtype != torch.bfloat16 for value in run.model().state_dict().values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_clipped(tiny: str, run_recipe: Runner, precision: str) -> None:
    """With a large eps Adam takes steps as long as the gradient, nearly; a tiny clip leaves the weights in place."""
    plan = ["optimiser.algorithm=adam", "optimiser.eps=1.0", "optimiser.lr=1.0", "optimiser.weight_decay=0"]
    plan += ["optimiser.warmup=0", "optimiser.power=0", "train.steps=1", f"train.precision={precision}"]
    weights = []
    for clip in (1e-12, 1e-2):
        run, _ = run_recipe(tiny, *plan, f"optimiser.clip={clip}", name=f"clip-{clip}")
        weights.append(torch.cat([value.detach().flatten() for value in run.model().parameters()]))
    assert 0.9e-2 < float((weights[1] - weights[0]).norm()) < 1.01e-2


def test_an_evaluation_leaves_no_trace(tiny: str, run_recipe: Runner) -> None:
    runs = [run_recipe(tiny, "train.steps=9", f"train.eval_every={n}", name=f"every-{n}")[0] for n in (0, 2)]
    curves = [[row["loss"] for row in read_metrics(run.metrics)] for run in runs]
    assert curves[0] == curves[1]


def test_validation_and_test_are_of_the_task(tiny: str) -> None:
    task = open_task(load_recipe(tiny))
    assert set(task.splits) == {"train", "validation", "test"}
    assert task.text is not None
    assert len(task.text("test")) > 0
    with pytest.raises(SMAError, match="split: must be one of train, validation, test, got 'tset'"):
        task.split("tset")


def test_what_overflows_a_fixed_capacity_is_written_down(tiny: str, run_recipe: Runner) -> None:
    """The tokens that all layers dropped for lack of capacity, where it is logged; no column without a capacity."""
    capacity = "model.blocks[0].activate.capacity=0.05"
    run, _ = run_recipe(tiny, "train.steps=8", "train.log_every=2", capacity, name="fixed")
    logged = [row["overflow"] for row in read_metrics(run.metrics) if row["step"] % 2 == 0]
    assert len(logged) == 4
    assert all(count is not None and count > 0 for count in logged)
    plain, _ = run_recipe(tiny, "train.steps=8", name="plain")
    assert "overflow" not in read_metrics(plain.metrics)[0]
    assert describe({"loss": 1.0, "overflow": 1234}) == "loss 1.000, 1,234 tokens dropped for lack of capacity"

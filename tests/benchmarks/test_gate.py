"""Wrong results are not timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.measure import measure
from benchmarks.modules import ema, experts, mixture, sparse_ffn
from benchmarks.rows import Row, model, model_case
from benchmarks.subjects import Setting
from benchmarks.timing import Clock
from sma.ops import using
from sma.ops.combine import OP
from sma.ops.router import Gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTING = Setting(DEVICE, torch.float32).of(2, 64).small()
ROWS = [
    ema(causal=True, dtype=None),
    sparse_ffn(32, 64, 0.3),
    sparse_ffn(32, 64, 0.3, graph=True),
    experts("ours", mixture, ours=True),
]


@pytest.fixture
def slightly_wrong() -> Iterator[None]:
    """A combine that the library would prefer, and that is off by a thousandth."""

    @OP.backend("slightly_wrong", priority=1)
    def run(*args: Any) -> Any:
        with using("eager"):
            return OP(*args) * 1.001

    yield
    OP.remove("slightly_wrong")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS, ids=["ema", "ffn", "ffn of fixed capacity", "experts"])
def test_modules_pass(row: Row, dtype: torch.dtype) -> None:
    setting = replace(SETTING, dtype=dtype)
    assert row.check is not None
    assert gate.check(row.check(setting), setting) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["seqboat_image", "seqboat_lm", "mega_chunk_text"])
def test_models_pass(spec: str, dtype: torch.dtype) -> None:
    setting = replace(SETTING, dtype=dtype)
    assert gate.check(model_case(spec, setting, "d_model=32"), setting) is None


def test_a_small_error_is_found(slightly_wrong: None) -> None:
    wrong = gate.check(model_case("seqboat_text", SETTING, "d_model=32"), SETTING)
    assert wrong is not None
    assert "in float32: largest error" in wrong


def test_decisions_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = Gate.decide

    def other(self: Gate, score: Tensor) -> Tensor:
        chosen = decide(self, score)
        return chosen if score.dtype == torch.float64 else ~chosen

    monkeypatch.setattr(Gate, "decide", other)
    wrong = gate.check(model_case("seqboat_text", SETTING, "d_model=32"), SETTING)
    assert wrong == "100.0% of the decisions differ in float32"


def test_a_wrong_row_is_not_timed_and_the_others_are(slightly_wrong: None) -> None:
    rows = [model("ours", "seqboat_text", "d_model=32", share=0.3), ema(causal=False, dtype=None)]
    first, second = measure("w", [rows[0], replace(rows[1], label="ema")], SETTING, 1, Clock(DEVICE))
    assert first.train_ms is first.forward_ms is None
    assert first.error is not None
    assert first.error.startswith("not timed, its results are wrong: ")
    assert second.error is None
    assert len(second.train_ms or []) == len(second.forward_ms or []) == 1
    assert second.backends["ema"] in ("eager", "triton")

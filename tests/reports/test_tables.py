"""Tables say what the routings say."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sma.configurators import Always, Sigmoid
from sma.errors import RoutingError
from sma.layer import SparselyActivated, SparseMixture
from sma.routing import Routing
from sma.statistics import OperationCount
from sma_models.reports import compression_table, operations_table, rates_table, summarise_rates
from sma_modules.modules.gau import GAU
from tests.reports.conftest import MakeRoutings


def rendered(table: Table) -> list[list[str]]:
    """The cells of each line, of the text as a terminal shows it."""
    console = Console(file=io.StringIO(), width=120, no_color=True)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


def routing_of(rows: list[list[int]], lengths: list[int]) -> Routing:
    active = torch.tensor(rows, dtype=torch.bool)[..., None]
    column = torch.arange(active.shape[1]).expand(active.shape[:2])
    return Routing(active, active.double(), column < torch.tensor(lengths)[:, None], column)


def test_rates_are_those_of_the_real_tokens() -> None:
    first = routing_of([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], [4, 2, 0])
    row = summarise_rates({"layers.0.activate": first})[0]
    assert (row.name, row.module, row.label) == ("layers.0.activate", 0, "layer 0")
    # The empty sequence has no rate and does not pull the mean down.
    assert (row.mean, row.std, row.low, row.high) == pytest.approx((0.75, 0.25, 0.5, 1.0))
    assert row.span is None
    second = routing_of([[0, 0, 0, 0]], [4])
    joined = summarise_rates([{"layers.0.activate": first}, {"layers.0.activate": second}])[0]
    assert (joined.mean, joined.low) == pytest.approx((0.5, 0.0))
    assert ["layer", "0", "75.0", "%", "25.0", "%", "50.0", "%", "..", "100.0", "%", "-"] in rendered(
        rates_table({"layers.0.activate": first})
    )


def test_nothing_to_summarise() -> None:
    empty = summarise_rates({"a": routing_of([[0, 0]], [0])})[0]
    assert (empty.mean, empty.std, empty.low, empty.high) == (None, None, None, None)
    assert ["a", "-", "-", "-", "-"] in rendered(rates_table({"a": routing_of([[0, 0]], [0])}))
    assert summarise_rates([]) == []
    assert summarise_rates({}) == []


def test_each_module_of_a_mixture_has_a_row(make_routings: MakeRoutings) -> None:
    routings = make_routings(20, n_layers=2, n_modules=3, batch=2)
    rows = summarise_rates(routings)
    assert [(row.label, row.module) for row in rows[:4]] == [
        ("layer 0 module 0", 0),
        ("layer 0 module 1", 1),
        ("layer 0 module 2", 2),
        ("layer 1 module 0", 0),
    ]
    assert rows[4].mean == pytest.approx(float(routings["layers.1.activate"].rate()[:, 1].mean()))


def test_batches_must_agree(make_routings: MakeRoutings) -> None:
    with pytest.raises(RoutingError, match="every batch must have the layers"):
        summarise_rates([make_routings(5, n_layers=1), make_routings(5, n_layers=2)])


class TwoTexts(nn.Module):
    """Layers as models name them: below ``stack``, and in the routings below the name of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        gau = GAU.Config(d_qk=4, d_v=8, window=2).build(d_model=8, causal=True)
        attends = SparselyActivated(gau, Always(Always.Config()), d_model=8, causal=True)
        plain = SparseMixture([nn.Linear(8, 8), gau], Sigmoid(Sigmoid.Config(), n_modules=2), d_model=8, causal=True)
        self.stack = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"activate": layer}) for layer in (attends, plain)])}
        )


def test_attention_span_where_the_model_makes_it_known(make_routings: MakeRoutings) -> None:
    # Active at 0, 4 and 5: the first sees nothing, the second 4 back, the third 1 and 5 back.
    one = routing_of([[1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]], [6, 6])
    two = make_routings(6, n_layers=1, n_modules=2, batch=2)["layers.0.activate"]
    rows = summarise_rates({"first.layers.0.activate": one, "first.layers.1.activate": two}, model=TwoTexts())
    # A sequence without an active token has no span.
    assert rows[0].span == pytest.approx((0 + 4 + 3) / 3)
    assert rows[1].span is None
    assert rows[2].span is not None
    assert rows[2].span > 0
    assert summarise_rates({"elsewhere": one}, model=TwoTexts())[0].span is None


@pytest.mark.parametrize(
    ("count", "lines"),
    [
        (
            OperationCount(999, 2_500_000),
            [
                ["always", "on", "2.5", "M", "100.0", "%"],
                ["spent", "999", "0.0", "%"],
                ["saved", "2.5", "M", "100.0", "%"],
            ],
        ),
        (OperationCount(0, 0), [["spent", "0", "100.0", "%"], ["saved", "0", "0.0", "%"]]),
        (
            OperationCount(750 * 10**12, 10**15),
            [["always", "on", "1", "P", "100.0", "%"], ["saved", "250", "T", "25.0", "%"]],
        ),
    ],
)
def test_operations(count: OperationCount, lines: list[list[str]]) -> None:
    shown = rendered(operations_table(count))
    for line in lines:
        assert line in shown


def test_compression_marks_the_best_and_keeps_the_order() -> None:
    table = compression_table({"gzip -9": 2.0, "model": 1.5, "trigrams": 2.5})
    shown = rendered(table)
    assert shown.index(["gzip", "-9", "2.000", "25.0", "%"]) < shown.index(["model", "1.500", "18.8", "%"])
    assert [row.style for row in table.rows] == [None, "bold", None]
    assert compression_table({}).row_count == 0

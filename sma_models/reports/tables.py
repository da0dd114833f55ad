"""Tables for the terminal: rates, operations, compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from sma.errors import RoutingError
from sma.interfaces import Module
from sma.layer import SparselyActivated, SparseMixture
from sma.routing import Routing
from sma.statistics import OperationCount, attention_span
from sma_models.reports.channels import module_labels, short_labels

Batches = Mapping[str, Routing] | Sequence[Mapping[str, Routing]]
"""The routings of one batch, or of several."""


@dataclass(frozen=True)
class RateSummary:
    """The activation rate of one module of one layer, over sequences.

    Attributes:
        name: of the layer, as in the routings.
        module: number of the module in the layer.
        label: for people, "layer 0".
        mean, std, low, high: over the sequences that hold a token; None when there are none. ``std`` is that of these
            sequences, not an estimate for others.
        span: mean distance in tokens between an active token and those that it attends to; None where unknown.
    """

    name: str
    module: int
    label: str
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    span: float | None = None


def summarise_rates(routings: Batches, *, model: nn.Module | None = None) -> list[RateSummary]:
    """Activation rate of each layer and module, over all sequences of one or several batches.

    Args:
        routings: as models return them.
        model: whose routings they are; says which layers attend, and how far, and so makes attention spans known.

    Raises:
        RoutingError: the batches name different layers.
    """
    batches = [routings] if isinstance(routings, Mapping) else list(routings)
    names = list(batches[0]) if batches else []
    for batch in batches:
        if list(batch) != names:
            raise RoutingError(f"routings: every batch must have the layers {names}, got {list(batch)}")
    layers = _activated_layers(model) if model is not None else {}
    found = []
    for name, label in zip(names, short_labels(names), strict=True):
        parts = [batch[name] for batch in batches]
        rates = torch.cat([part.rate()[part.valid.any(1)].double().cpu() for part in parts])
        spans = _spans(_find(layers, name), parts)
        for m, module_label in enumerate(module_labels(label, parts[0].n_modules)):
            mean, std, low, high = _moments(rates[:, m])
            found.append(RateSummary(name, m, module_label, mean, std, low, high, spans[m]))
    return found


def _moments(rates: Tensor) -> tuple[float | None, float | None, float | None, float | None]:
    """Mean, standard deviation, minimum and maximum."""
    if rates.numel() == 0:
        return None, None, None, None
    return float(rates.mean()), float(rates.std(correction=0)), float(rates.min()), float(rates.max())


def _activated_layers(model: nn.Module) -> dict[str, SparseMixture]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, SparseMixture)}


def _find(layers: Mapping[str, SparseMixture], name: str) -> SparseMixture | None:
    """The layer of a routing: its name ends the path; a model of pairs puts "first." or "second." in front."""
    bare = name[name.find("layers.") :] if "layers." in name else name
    return next((layer for path, layer in layers.items() if path == bare or path.endswith(f".{bare}")), None)


def _spans(layer: SparseMixture | None, parts: Sequence[Routing]) -> list[float | None]:
    """Attention span of each module: the mean over the sequences in which it was active."""
    if layer is None:
        return [None] * parts[0].n_modules
    modules = [layer.module] if isinstance(layer, SparselyActivated) else list(layer.members)
    spans: list[float | None] = []
    for m, module in enumerate(modules):
        window = module.attention_window() if isinstance(module, Module) else None
        packs = [part.packed[m] for part in parts]
        found = [
            attention_span(pack, window, causal=layer.causal)[pack.lengths > 0].cpu()
            for pack in packs
            if window is not None
        ]
        values = torch.cat(found) if found else torch.empty(0)
        spans.append(float(values.mean()) if values.numel() else None)
    return spans


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def rates_table(routings: Batches, *, model: nn.Module | None = None) -> Table:
    """Activation rate per layer: mean, standard deviation and range over the sequences, attention span if known.

    Raises:
        RoutingError: see :func:`summarise_rates`.
    """
    table = Table(title="Activation rate", box=box.SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for heading in ("mean", "std", "min .. max", "span"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summarise_rates(routings, model=model):
        reach = "-" if row.low is None else f"{_percent(row.low)} .. {_percent(row.high)}"
        span = "-" if row.span is None else f"{row.span:.1f}"
        table.add_row(row.label, _percent(row.mean), _percent(row.std), reach, span)
    return table


def operations_table(count: OperationCount) -> Table:
    """Floating-point operations spent, beside those of the same model always on."""
    table = Table(title="Floating-point operations of one forward pass", box=box.SIMPLE_HEAD, min_width=50)
    table.add_column("")
    table.add_column("operations", justify="right")
    table.add_column("share", justify="right")
    share = count.spent / count.always_on if count.always_on else 1.0
    table.add_row("always on", _engineering(count.always_on), _percent(1.0))
    table.add_row("spent", _engineering(count.spent), _percent(share))
    table.add_row("saved", _engineering(count.always_on - count.spent), _percent(count.saved), style="bold")
    return table


def _engineering(number: int) -> str:
    """1234567 is "1.23 M"."""
    size, units = float(number), ["", "k", "M", "G", "T", "P"]
    while abs(size) >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}".rstrip()


def compression_table(bits_per_byte: Mapping[str, float]) -> Table:
    """Bits per byte by name, in the order given; the lowest stands out.

    The share is that of the size without any model, 8 bits per byte.
    """
    table = Table(title="Held-out bytes", box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    table.add_column("bits per byte", justify="right")
    table.add_column("share of 8 bits", justify="right")
    best = min(bits_per_byte.values(), default=0.0)
    for name, bits in bits_per_byte.items():
        table.add_row(name, f"{bits:.3f}", _percent(bits / 8), style="bold" if bits == best else None)
    return table

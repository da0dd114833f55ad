"""``sma build``: a fresh model from a spec, or only its size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import nn

import sma
from sma.errors import ConfigError
from sma.spec.sizes import Size, blueprint
from sma_models.cli.common import out


def build(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A spec's name or file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.", show_default=False)
    ] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only count; takes no memory for weights.")] = False,
    to: Annotated[Path | None, typer.Option(help="File to write: untrained weights and spec in safetensors.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Build an untrained model, after a check that it fits the memory; --dry prints what each part of it counts."""
    if dry == (to is not None):
        raise ConfigError("to: must be given, or else --dry, which only counts, got " + ("both" if dry else "neither"))
    config = sma.load_spec(spec, *(overrides or []), kind="model")
    if to is None:
        model = blueprint(config)
        if model is None:
            raise ConfigError(f"{spec}: must be a model that can be built without memory, got {config.owner.__name__}")
        out().print(sizes_table(model))
        return
    import torch

    if to.exists() and not force:
        raise ConfigError(f"to: must be a new file, got {to}, which exists; --force overwrites it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = sma.build(config)
    sma.save(built, to)
    out().print(f"{to}: {Size.of(built).parameters:,} parameters", soft_wrap=True)


def sizes_table(model: nn.Module) -> Table:
    """What a model and its parts hold; a tensor that parts share is counted in each of them and once in the sum."""
    table = Table("part", "parameters", "buffers", "bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in _parts(model):
        size = Size.of(part)
        table.add_row(name, f"{size.parameters:,}", f"{size.buffers:,}", f"{size.nbytes:,}")
    total = Size.of(model)
    table.add_section()
    table.add_row("all", f"{total.parameters:,}", f"{total.buffers:,}", f"{total.nbytes:,}")
    return table


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of the model that hold something, the layers of a stack one by one."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        inner = list(child.named_children())
        if any(isinstance(each, nn.ModuleList) for _, each in inner):
            for below, each in inner:
                layers = each.named_children() if isinstance(each, nn.ModuleList) else [("", each)]
                parts += [(f"{name}.{below}.{number}".removesuffix("."), layer) for number, layer in layers]
        else:
            parts.append((name, child))
    return [(name, part) for name, part in parts if any(True for _ in (*part.parameters(), *part.buffers()))]

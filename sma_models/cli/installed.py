"""``sma plugins`` and ``sma specs``: the registered names."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

import sma
from sma_models.cli.common import out


def plugins(
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
) -> int:
    """List what is registered: name, kind and who provides it. Exit code 1 when a plugin failed to load."""
    registry = sma.plugins.registry()
    table = Table("kind", "name", "provider", "version")
    for entry in registry.entries():
        if kind is None or entry.kind == kind:
            provider = entry.provider
            table.add_row(
                entry.kind, entry.name, f"{provider.distribution or '-'} ({provider.module})", provider.version or "-"
            )
    out().print(table)
    failures = registry.failures()
    for failure in failures:
        out().print(f"failed: {failure}", style="red", markup=False, soft_wrap=True)
    return 1 if failures else 0


def specs(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A spec's name or file; none lists them all.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.", show_default=False)
    ] = None,
) -> None:
    """List the specs, or print one with every value written out and the number of its parameters."""
    if name is None:
        registry = sma.plugins.registry()
        table = Table("spec", "model", "parameters", "provider")
        for each in registry.names("spec"):
            provider = registry.entry("spec", each).provider
            table.add_row(each, *_described(each), provider.distribution or provider.module)
        out().print(table)
        return
    config = sma.load_spec(name, *(overrides or []))
    typer.echo(sma.spec.to_yaml(config), nl=False)
    typer.echo(f"# {count_parameters(config):,} parameters")


def _described(name: str) -> tuple[str, str]:
    """Model and parameters of a spec; the error instead, if the spec is broken."""
    try:
        config = sma.load_spec(name)
        return sma.plugins.registry().name_of(config.owner) or "-", f"{count_parameters(config):,}"
    except sma.SMAError as error:
        return f"broken: {error}", "-"


def count_parameters(config: sma.BaseConfig) -> int:
    """Parameters of the model that a spec describes, without the memory for them."""
    import torch

    from sma.spec.sizes import Size

    with torch.device("meta"):
        return Size.of(config.build()).parameters

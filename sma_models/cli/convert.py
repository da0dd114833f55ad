"""``sma convert``: weights of the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sma
from sma.errors import ConfigError
from sma_models.cli.common import out


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the published SeqBoat, .pt or .safetensors.")],
    spec: Annotated[str, typer.Option(help="Name or file of the spec of the same sizes.")],
    to: Annotated[Path, typer.Option(help="File to write: weights and spec in safetensors.")],
    change: Annotated[list[str] | None, typer.Option(help="key=value, a change to the spec; may be repeated.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Bring weights of the published SeqBoat into a model of this library."""
    from sma.weights import save
    from sma_models.integrations.convert import convert_into

    if to.exists() and not force:
        raise ConfigError(f"to: must be a new file, got {to}, which exists; --force overwrites it")
    model = sma.build(spec, *(change or []), kind="model")
    convert_into(model, checkpoint)
    save(model, to)
    out().print(f"{to}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters", soft_wrap=True)

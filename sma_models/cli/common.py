"""What the commands share: arguments, consoles, optional extras."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sma.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import torch

    from sma_models.training.run import Run

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a run, or recipe/name, or a recipe for its latest run.")
]
RunsOption = Annotated[Path, typer.Option("--runs", envvar="SMA_RUNS", help="Folder that holds the runs.")]
RUNS = Path("runs")


def out() -> Console:
    """Where results go."""
    return Console(highlight=False)


def notes() -> Console:
    """Where progress goes."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of an optional extra.

    Raises:
        MissingExtraError: a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if not top or top.startswith("sma"):
            raise
        raise MissingExtraError(
            f"{top} is not installed; it comes with the extra {name!r}: pip install 'sparse-modular-activation[{name}]'"
        ) from error


def find_run(text: str, runs: Path) -> Run:
    """The run that the user names."""
    with extra("train"):
        from sma_models.training import run
    return run.find_run(text, runs)


def usable_device(device: str) -> torch.device:
    """The device of this name; ``auto`` is the GPU if there is one.

    Raises:
        ConfigError: this machine has none of this name.
    """
    import torch

    place = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: must be one that this machine has, got {device!r} ({reason})") from error
    return torch.device(place)


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """``RECIPE KEY=VALUE ...`` as the recipe (None when there is none) and the overrides.

    Raises:
        ConfigError: more than one name, or a name behind an override.
    """
    names = [each for each in arguments if "=" not in each]
    if len(names) > 1 or (names and arguments[0] != names[0]):
        stray = names[1] if len(names) > 1 else names[0]
        raise ConfigError(f"arguments: must be one recipe and then key=value, got {stray!r}")
    return (names[0] if names else None), [each for each in arguments if "=" in each]

"""The ``sma`` command: training, evaluation, generation, serving, inspection, and lists of what is installed.

A mistake of the user ends in one line on stderr and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sma import __version__
from sma.errors import SMAError
from sma_models.cli import build, convert, demo, export, inspection, installed, serve, training

# Typer's own errors about arguments derive from this one, wherever the release keeps it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="sma",
    help="Sparse Modular Activation: train, look inside and run models that activate their modules per token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(training.train)
app.command("eval")(training.evaluate)
app.command("data")(training.data)
app.command("generate")(inspection.generate)
app.command("inspect")(inspection.inspect)
app.command("serve")(serve.serve)
app.command("plugins")(installed.plugins)
app.command("specs")(installed.specs)
app.command("build")(build.build)
app.command("convert")(convert.convert)
app.command("export")(export.export_graphs)
app.command("export-hf")(export.export_hf)
app.command("demo")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sma {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Sparse Modular Activation: train, look inside and run models that activate their modules per token."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code, 0 for success, 2 for a mistake of the user, 128 + n after signal n.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [each for each in given if each != "--debug"]
    debug = len(arguments) < len(given)
    try:
        code = app(args=arguments or ["--help"], prog_name="sma", standalone_mode=False)
    except (SMAError, OSError, _UsageError) as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(str(text).split()) or type(error).__name__

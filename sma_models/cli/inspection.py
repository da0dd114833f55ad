"""``sma generate`` and ``sma inspect``: what a trained model writes, and what it activates."""

from __future__ import annotations

import codecs
import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sma.errors import ConfigError
from sma_models.cli.common import RUNS, RunArgument, RunsOption, extra, find_run, out

if TYPE_CHECKING:
    from sma.interfaces import Model


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Bytes to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest bytes of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    runs: RunsOption = RUNS,
) -> None:
    """Generate text with the language model of a run; the prompt comes first."""
    found = find_run(run, runs)
    model = byte_model(found.model())
    start = prompt or "\n"
    typer.echo(start, nl=False)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for text in generated_text(model, start.encode(), max_new_tokens, seed, **options):
        typer.echo(text, nl=False)
        sys.stdout.flush()
    typer.echo()


def byte_model(model: Model) -> Any:
    """The model, when it is a language model of bytes.

    Raises:
        ConfigError: it is not.
    """
    from sma_models.language_model import LanguageModel

    if not isinstance(model, LanguageModel) or model.vocab_size != 256:
        raise ConfigError(f"model: must be a language model of bytes (vocab_size 256), got {type(model).__name__}")
    return model


def generated_text(model: Any, prompt: bytes, count: int, seed: int, **options: Any) -> Iterator[str]:
    """Yield the text that a language model of bytes generates after ``prompt``, byte by byte.

    Bytes outside UTF-8 become U+FFFD.
    """
    import torch

    from sma_models.inference.generation import stream

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)])
    for token in itertools.islice(stream(model, tokens, generator=generator, **options), count):
        yield decoder.decode(bytes([int(token)]))
    yield decoder.decode(b"", final=True)


def inspect(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as data.root=.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    batches: Annotated[int, typer.Option(min=1, help="How many batches to look at.")] = 4,
    runs: RunsOption = RUNS,
) -> None:
    """Show what the model of a run activates: rate and span of each layer, operations spent, figures."""
    found = find_run(run, runs)
    with extra("train"):
        from sma_models.cli.report import report
        from sma_models.training.loop import open_task
    recipe = found.recipe(*(overrides or []))
    report(found, found.model(), open_task(recipe), recipe.train, out(), split=split, batches=batches)

"""``sma generate`` and ``sma inspect``: what a trained model writes, and what it activates."""

from __future__ import annotations

import codecs
import itertools
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sma.errors import ConfigError
from sma_models.commands.common import RUNS, RunArgument, RunsOption, extra, find_run, out

if TYPE_CHECKING:
    from sma.interfaces import Model


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Bytes to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest bytes of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    runs: RunsOption = RUNS,
) -> None:
    """Write text with the language model of a run; the prompt comes first."""
    found = find_run(run, runs)
    text = prompt or "\n"
    typer.echo(text, nl=False)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for piece in written(found.model(), text.encode(), max_new_tokens, seed, **options):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def written(model: Model, prompt: bytes, count: int, seed: int, **options: float | int | None):  # type: ignore[no-untyped-def]
    """Yield the text that a byte-level language model writes after ``prompt``, as it comes; what is no UTF-8 is replaced.

    Raises:
        ConfigError: it is no language model of bytes.
    """
    import torch

    from sma_models.generation import stream
    from sma_models.heads import LanguageModel

    if not isinstance(model, LanguageModel) or model.vocab_size != 256:
        raise ConfigError(f"model: must be a language_model of bytes (vocab_size 256), got {type(model).__name__}")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)])
    for token in itertools.islice(stream(model, tokens, generator=generator, **options), count):  # type: ignore[arg-type]
        yield decoder.decode(bytes([int(token)]))
    yield decoder.decode(b"", final=True)


def inspect(run: RunArgument, runs: RunsOption = RUNS) -> None:
    """Show what the model of a run activates: rate and span of each layer, operations spent, figures."""
    raise ConfigError("not there yet")

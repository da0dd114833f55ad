"""``sma export-hf``: a trained model as a folder that Hugging Face Transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sma_models.commands.common import RUNS, RunArgument, RunsOption, extra, find_run, out


def export_hf(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="Folder to write: weights, spec, and the tokenizer of bytes.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; by default that of the run."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that has something in it.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Write the model of a run for Hugging Face Transformers: AutoModelForCausalLM.from_pretrained(FOLDER)."""
    found = find_run(run, runs)
    with extra("hf"):
        from sma_models.hf import export
    import torch

    kind = None if dtype is None else getattr(torch, dtype)
    folder = export(found.model(), to, dtype=kind, max_shard_size=max_shard_size, force=force)
    files = sorted(path.name for path in folder.iterdir())
    out().print(f"{folder}: {', '.join(files)}", soft_wrap=True)

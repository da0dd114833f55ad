"""``sma export`` and ``sma export-hf``: trained models as folders that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sma_models.cli.common import RUNS, RunArgument, RunsOption, extra, find_run, out, usable_device

DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Dtype of the weights; by default that of the run."),
]


def export_hf(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="Folder to write: weights, spec, and the tokenizer of bytes.")],
    dtype: DtypeOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one file of weights.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Write the model of a run for Hugging Face Transformers: AutoModelForCausalLM.from_pretrained(FOLDER)."""
    found = find_run(run, runs)
    with extra("hf"):
        from sma_models.integrations.hf import export
    import torch

    kind = None if dtype is None else getattr(torch, dtype)
    folder = export(found.model(), to, dtype=kind, max_shard_size=max_shard_size, force=force)
    files = sorted(path.name for path in folder.iterdir())
    out().print(f"{folder}: {', '.join(files)}", soft_wrap=True)


def export_graphs(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="Folder to write: the graphs, and runner.py, which runs them.")],
    format: Annotated[
        Literal["onnx", "aoti"] | None,
        typer.Option(
            help="onnx for ONNX Runtime on a CPU; aoti for machine code by AOTInductor, which needs a C++ compiler. "
            "By default onnx, except for bfloat16 and CUDA."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="What the graphs are for: cpu, cuda, cuda:1.")] = "cpu",
    dtype: DtypeOption = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Sequences in a batch; by default any number in a step, and one in the other graphs."),
    ] = None,
    chunk: Annotated[
        int, typer.Option(help="Tokens that are prefilled at once; for a classifier, the longest input.")
    ] = 256,
    capacity: Annotated[
        float,
        typer.Option(help="Capacity of each layer, as a share of these tokens; active tokens beyond it are dropped."),
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Write the model of a run as graphs that run without this library, by ONNX Runtime or AOTInductor."""
    found = find_run(run, runs)
    place = usable_device(device)
    import torch

    from sma_models.integrations.export import export

    kind = None if dtype is None else getattr(torch, dtype)
    options: dict[str, Any] = {"batch": batch, "chunk": chunk, "capacity": capacity, "force": force}
    with extra("export"):
        folder = export(found.model().to(place, kind).eval(), to, format=format, **options)
    files = sorted(path.name for path in folder.iterdir())
    out().print(f"{folder}: {', '.join(files)}", soft_wrap=True)

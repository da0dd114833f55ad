"""Exported models as folders: the graphs, what they take and give, the beginning of a stream, and what runs them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sma import __version__
from sma.errors import ConfigError, ExportError
from sma.interfaces import Model
from sma_models.export import runner
from sma_models.export.program import STATE, Exported, export_forward, export_prefill, export_step
from sma_models.export.quiet import quiet
from sma_models.heads import LanguageModel

Format = Literal["onnx", "aoti"]
SUFFIX = {"onnx": ".onnx", "aoti": ".pt2"}


def export(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    batch: int | None = None,
    chunk: int = 256,
    capacity: float = 1.0,
    force: bool = False,
) -> Path:
    """Write a model as graphs that run without this library.

    Of a language model these are ``prefill`` and ``step``, of any other ``forward``.

    Args:
        model: in evaluation mode, in float32 on the CPU. It is left as it is.
        folder: the folder to write; a new one appears complete or not at all.
        format: "onnx" for ONNX Runtime, "aoti" for machine code by AOTInductor, which runs on machines like this one
            with this version of PyTorch, and takes a C++ compiler to write.
        batch: how many sequences the graphs take; None for a step of any number and a prefill or forward of one.
        chunk: how many tokens of a prompt are read at once; of a model that reads whole sequences, their length.
        capacity: as for :func:`export_prefill`.
        force: write into a folder that has something in it.

    Raises:
        ConfigError: an argument is out of range, or the folder is not empty.
        StreamingError: the model cannot stream; the message says why.
        ExportError: a part of it cannot be exported; the message names it and says why.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    target = _free(folder, force)
    one = 1 if batch is None else batch
    graphs: dict[str, Exported]
    if isinstance(model, LanguageModel):
        graphs = {"prefill": export_prefill(model, one, chunk, capacity=capacity), "step": export_step(model, batch)}
    else:
        graphs = {"forward": export_forward(model, one, chunk, capacity=capacity)}
    return save(graphs, target, format=format, force=force)


def save(
    graphs: Mapping[str, Exported], folder: str | os.PathLike[str], *, format: Format = "onnx", force: bool = False
) -> Path:
    """Write graphs into a folder that :class:`~sma_models.export.runner.Runner` takes.

    Args:
        graphs: by name: "prefill" and "step", or "forward".
        folder: as for :func:`export`, like the rest.
        format: see there.
        force: see there.

    Raises:
        ConfigError: an unknown format, or the folder is not empty.
        ExportError: an operation has no counterpart, or there is no C++ compiler.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    if format not in SUFFIX:
        raise ConfigError(f"format: must be one of {', '.join(SUFFIX)}, got {format!r}")
    target = _free(folder, force)
    place = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        for name, exported in graphs.items():
            _write(exported, place / f"{name}{SUFFIX[format]}", format)
        examples = [item for exported in graphs.values() for item in exported.example.items()]
        state = {name: each[:1].numpy() for name, each in examples if name.startswith(STATE)}
        if state:
            np.savez_compressed(place / "state.npz", **state)  # type: ignore[arg-type]  # none is called as an option is
        (place / "export.json").write_text(json.dumps(_about(graphs, format), indent=1), "utf-8")
        shutil.copyfile(runner.__file__, place / "runner.py")
        if not target.exists():
            place.replace(target)
        else:
            for file in place.iterdir():
                file.replace(target / file.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return target


def load(folder: str | os.PathLike[str], *, threads: int | None = None) -> runner.Runner:
    """What runs an exported folder; see :class:`~sma_models.export.runner.Runner`.

    Raises:
        ConfigError: it is no such folder.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    try:
        return runner.Runner(Path(folder), threads=threads)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"folder: must be one that was exported, got {folder}: {error}") from error


def _free(folder: str | os.PathLike[str], force: bool) -> Path:
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"folder: must be a folder, got the file {target}")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConfigError(f"folder: must be new or empty, got {target}, which holds something; force overwrites it")
    return target


def _write(exported: Exported, path: Path, format: Format) -> None:
    if format == "onnx":
        from sma_models.export import to_onnx

        to_onnx.write(exported, path)
        return
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        with quiet():
            aoti_compile_and_package(exported.program, package_path=str(path))
    except (InductorError, InvalidCxxCompiler) as error:
        reason = next(line for line in (*str(error).splitlines(), type(error).__name__) if line)
        raise ExportError(f"{path.stem}: cannot be compiled by AOTInductor: {reason}") from error


def _about(graphs: Mapping[str, Exported], format: Format) -> dict[str, Any]:
    """What a runner has to know, and who reads the folder wants to."""
    return {
        "version": runner.Runner.VERSION,
        "made_by": f"sparse-modular-activation {__version__}",
        "format": format,
        "graphs": {
            name: {
                "file": f"{name}{SUFFIX[format]}",
                "inputs": [
                    {
                        "name": key,
                        "dtype": str(each.dtype).removeprefix("torch."),
                        "shape": [None if exported.dynamic else each.shape[0], *each.shape[1:]],
                    }
                    for key, each in exported.example.items()
                ],
                "outputs": list(exported.outputs),
            }
            for name, exported in graphs.items()
        },
    }

"""Exported models as folders: the graphs, what they take and give, the beginning of a stream, and what runs them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sma import __version__
from sma.errors import ConfigError, ExportError
from sma.interfaces import Model
from sma_models.integrations.export import runner
from sma_models.integrations.export.program import (
    STATE,
    Exported,
    check_model,
    export_forward,
    export_prefill,
    export_step,
)
from sma_models.integrations.export.quiet import quiet
from sma_models.language_model import LanguageModel

Format = Literal["onnx", "aoti"]
SUFFIX = {"onnx": ".onnx", "aoti": ".pt2"}
ONNX_DTYPES = (torch.float32, torch.float16)
"""The dtypes that ONNX Runtime computes in on a CPU."""
INDUCTOR = {"triton.autotune_at_compile_time": False}
"""Kernels are tuned on the example, as random numbers would make them read outside of tensors."""


def export(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    format: Format | None = None,
    batch: int | None = None,
    chunk: int = 256,
    capacity: float = 1.0,
    force: bool = False,
) -> Path:
    """Write a model as graphs that run without this library.

    Of a language model these are ``prefill`` and ``step``, of any other ``forward``.

    Args:
        model: in evaluation mode, in the dtype and on the device that the graphs are to compute in. It is left as it
            is.
        folder: the folder to write; a new one appears complete or not at all.
        format: "onnx" for ONNX Runtime on a CPU, of models in float32 or float16; "aoti" for machine code by
            AOTInductor, which runs on machines and devices like these with this version of PyTorch, and takes a C++
            compiler to write. None for the first of them that can be.
        batch: how many sequences the graphs take; None for a step of any number and a prefill or forward of one.
        chunk: how many tokens of a prompt are prefilled at once; of a model that reads whole sequences, their length.
        capacity: as for :func:`export_prefill`.
        force: write into a folder that has something in it.

    Raises:
        ConfigError: an argument is out of range, the format is not for such a model, or the folder is not empty.
        StreamingError: the model cannot stream; the message says why.
        ExportError: a part of it cannot be exported; the message names it and says why.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    weight = check_model(model)
    format = _format(format, weight.dtype, weight.device)
    target = _free(folder, force)
    one = 1 if batch is None else batch
    graphs: dict[str, Exported]
    if isinstance(model, LanguageModel):
        graphs = {"prefill": export_prefill(model, one, chunk, capacity=capacity), "step": export_step(model, batch)}
    else:
        graphs = {"forward": export_forward(model, one, chunk, capacity=capacity)}
    return save(graphs, target, format=format, force=force)


def save(
    graphs: Mapping[str, Exported],
    folder: str | os.PathLike[str],
    *,
    format: Format | None = None,
    force: bool = False,
) -> Path:
    """Write graphs into a folder that :class:`~sma_models.integrations.export.runner.Runner` takes.

    Args:
        graphs: by name: "prefill" and "step", or "forward".
        folder: as for :func:`export`, like the rest.
        format: see there.
        force: see there.

    Raises:
        ConfigError: there are no graphs, or they are of several dtypes or devices, the format is unknown or not for
            them, or the folder is not empty.
        ExportError: an operation has no counterpart, or there is no C++ compiler.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    kinds = {(exported.dtype, exported.device) for exported in graphs.values()}
    if len(kinds) != 1:
        got = ", ".join(f"{name} in {each.dtype} on {each.device}" for name, each in graphs.items())
        raise ConfigError(f"graphs: must be in one dtype on one device, got {got or 'none'}")
    format = _format(format, *kinds.pop())
    target = _free(folder, force)
    place = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        for name, exported in graphs.items():
            _write(exported, place / f"{name}{SUFFIX[format]}", format)
        examples = [item for exported in graphs.values() for item in exported.example.items()]
        state = {name: _as_numpy(each[:1]) for name, each in examples if name.startswith(STATE)}
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


def load(folder: str | os.PathLike[str], *, threads: int | None = None, device: str | None = None) -> runner.Runner:
    """What runs an exported folder; see :class:`~sma_models.integrations.export.runner.Runner`.

    Raises:
        ConfigError: it is no such folder, or the device is not one that it runs on.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    try:
        return runner.Runner(Path(folder), threads=threads, device=device)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"folder: must be one that was exported and can run here, got {folder}: {error}") from error


def _format(wanted: Format | None, dtype: torch.dtype, device: torch.device) -> Format:
    """The format of graphs in this dtype on this device."""
    if wanted is not None and wanted not in SUFFIX:
        raise ConfigError(f"format: must be one of {', '.join(SUFFIX)}, got {wanted!r}")
    able = dtype in ONNX_DTYPES and device.type == "cpu"
    if wanted == "onnx" and not able:
        raise ConfigError(
            f"format: must be 'aoti' for a model in {dtype} on {device}, got 'onnx': ONNX Runtime runs models in "
            f"{' or '.join(map(str, ONNX_DTYPES))} on the CPU"
        )
    return wanted or ("onnx" if able else "aoti")


def _free(folder: str | os.PathLike[str], force: bool) -> Path:
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"folder: must be a folder, got the file {target}")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConfigError(f"folder: must be new or empty, got {target}, which holds something; force overwrites it")
    return target


def _write(exported: Exported, path: Path, format: Format) -> None:
    if format == "onnx":
        from sma_models.integrations.export import to_onnx

        to_onnx.write(exported, path)
        return
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        with quiet(), torch.no_grad():  # it runs once, to tune
            aoti_compile_and_package(exported.program, package_path=str(path), inductor_configs=INDUCTOR)
    except (InductorError, InvalidCxxCompiler) as error:
        lines = [line for line in (*str(error).splitlines(), type(error).__name__) if line.strip()]
        reason = next((line for line in lines if "error: " in line or "cannot find" in line), lines[0])
        raise ExportError(f"{path.stem}: cannot be compiled by AOTInductor: {reason}") from error


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    """NumPy has no bfloat16; every one is a float32 too."""
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


def _about(graphs: Mapping[str, Exported], format: Format) -> dict[str, Any]:
    """The description of the folder, for the runner and for readers."""
    return {
        "version": runner.Runner.VERSION,
        "made_by": f"sparse-modular-activation {__version__}",
        "format": format,
        "device": next(iter(graphs.values())).device.type,
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

"""Graphs as ONNX files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from sma.errors import ExportError
from sma_models.integrations.export.program import Exported
from sma_models.integrations.export.quiet import quiet

OPSET = 20
"""Version of the operators. It is the first with Fourier transforms as they are now."""


def write(exported: Exported, path: Path) -> None:
    """Write a graph; large weights lie in a file of their own beside it.

    Raises:
        ExportError: an operation of it has no counterpart; the message names the module that it comes from.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    translations = _translations()  # first of all, as it needs the extra
    with quiet():
        try:
            program = torch.onnx.export(
                exported.program,
                input_names=list(exported.inputs),
                output_names=list(exported.outputs),
                opset_version=OPSET,
                custom_translation_table=translations,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(_explained(exported, error)) from error
        assert program is not None
        program.save(path)


def _explained(exported: Exported, error: Exception) -> str:
    """Which operation of which module has no counterpart."""
    chain: list[str] = []
    one: BaseException | None = error
    while one is not None:
        chain.append(str(one))
        one = one.__cause__
    text = "\n".join(chain)
    node = re.search(r"translating node %(\w+)", text)
    operation = re.search(r"target=torch\.ops\.([\w.]+)\]", text)
    if node is None or operation is None:
        return (
            f"onnx: cannot be exported: {next((line for line in reversed(chain) if line), repr(error)).splitlines()[0]}"
        )
    place = "the model"
    for each in exported.program.graph.nodes:
        # Behind its decomposition an operation may have another name.
        if each.name == node[1] or operation[1].split(".")[1] in str(each.target):
            for path, kind in (each.meta.get("nn_module_stack") or {}).values():
                name = path.removeprefix("model").lstrip(".")
                place = f"{name} ({str(kind).rpartition('.')[2]})" if name else place
    return f"{place}: cannot be exported to ONNX: there is no counterpart of {operation[1]}"


def _translations() -> dict[Any, Any]:
    """Operations that torch does not translate, or not with all of their arguments."""
    from onnxscript import opset20 as op

    def repeat_interleave(repeats: Any, output_size: int | None = None) -> Any:
        ends = op.CumSum(repeats, op.Constant(value_int=0))
        total = op.ReduceSum(repeats, keepdims=0) if output_size is None else op.Constant(value_int=output_size)
        row = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
        passed = op.GreaterOrEqual(op.Unsqueeze(row, op.Constant(value_ints=[1])), ends)
        return op.ReduceSum(op.Cast(passed, to=7), op.Constant(value_ints=[1]), keepdims=0)

    def sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # Of equal ones the first comes first: that is stable.
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.repeat_interleave.Tensor: repeat_interleave, torch.ops.aten.sort.stable: sort}

"""Models as graphs of fixed shapes, for ONNX Runtime and AOTInductor (extra ``export``)."""

from sma_models.integrations.export.folder import Format, export, load, save
from sma_models.integrations.export.program import Exported, export_forward, export_prefill, export_step
from sma_models.integrations.export.runner import Runner

__all__ = [
    "Exported",
    "Format",
    "Runner",
    "export",
    "export_forward",
    "export_prefill",
    "export_step",
    "load",
    "save",
]

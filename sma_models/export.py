"""The name of :mod:`sma_models.integrations.export` in 0.1.0."""

from sma_models.integrations.export import (
    Exported,
    Format,
    Runner,
    export,
    export_forward,
    export_prefill,
    export_step,
    load,
    save,
)

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

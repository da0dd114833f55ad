"""A saved folder that loads where this library is installed but was not imported.

Beside the weights lies a module of one import, which ``trust_remote_code=True`` runs in place of a copy of the code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

AUTO_MODELS = {
    "SMAForCausalLM": "AutoModelForCausalLM",
    "SMAForSequenceClassification": "AutoModelForSequenceClassification",
}
_MODULE = "sma_loader"
_SOURCE = '''"""Finds the classes of this model in the package sparse-modular-activation, extra "hf"."""

from sma_models.hf import {names}

__all__ = [{listed}]
'''


class Loadable:
    """Keeps Transformers from copying the code of a class into every folder that it saves."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the module of one import finds the class."""


def write_loader(folder: str | os.PathLike[str], **classes: str) -> dict[str, str]:
    """Write the module, and say where the Auto classes find theirs: ``{"AutoConfig": "sma_loader.SMAConfig"}``.

    Args:
        folder: made if need be.
        **classes: names of classes of :mod:`sma_models.integrations.hf` by their Auto class.
    """
    names = sorted({"SMAByteTokenizer", "SMAConfig", *AUTO_MODELS})
    source = _SOURCE.format(names=", ".join(names), listed=", ".join(f'"{name}"' for name in names))
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{_MODULE}.py").write_text(source, encoding="utf-8")
    return {auto: f"{_MODULE}.{name}" for auto, name in classes.items()}

"""Saved folders import the models by ``sma_models.hf``, wherever the code lies."""

from __future__ import annotations

from pathlib import Path

import sma_models.hf
import sma_models.integrations.hf
from sma_models.integrations.hf.loader import write_loader


def test_the_stable_name_has_the_names_of_the_package() -> None:
    assert sma_models.hf.__all__ == sma_models.integrations.hf.__all__
    for name in sma_models.hf.__all__:
        assert getattr(sma_models.hf, name) is getattr(sma_models.integrations.hf, name)


def test_saved_folders_import_by_it(tmp_path: Path) -> None:
    write_loader(tmp_path, AutoTokenizer="SMAByteTokenizer")
    [file] = tmp_path.glob("*.py")
    assert "sma_models.hf" in file.read_text("utf-8")
    assert "integrations" not in file.read_text("utf-8")

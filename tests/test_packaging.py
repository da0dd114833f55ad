"""The distribution holds every file that the packages need, and importing the core stays cheap."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import sma

ROOT = Path(__file__).parent.parent
PACKAGES = ("sma", "sma_modules", "sma_models")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the project, so that nothing is left behind in the working tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    run = subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files - set(wheel.namelist()) == set()
    assert {f"{package}/py.typed" for package in PACKAGES} <= files


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + [item for items in extras.values() for item in items]
    names = {item.split(">")[0] for item in required if not item.startswith("sparse-modular-activation")}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names - pinned == set()
    assert not [line for line in lines if "+" in line], "a local version such as 2.13.0+cpu is not to be had everywhere"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sma.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Ren", "Liu", "Wang", "Xu", "Zhu", "Zhai"]
    assert f"## {sma.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def loaded_by(package: str) -> set[str]:
    """The packages that are loaded when ``package`` is imported."""
    program = f"import sys, {package}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_core_is_cheap() -> None:
    """`import sma` loads no plugin and none of the packages that only specs, plugins or training need."""
    loaded = loaded_by("sma")
    assert "sma" in loaded
    assert loaded & {"sma_modules", "sma_models", "lightning", "matplotlib", "pooch", "tensorboard", "typer"} == set()
    assert "transformers" not in loaded


def test_transformers_is_loaded_by_the_package_that_needs_it_only() -> None:
    assert "transformers" not in loaded_by("sma_models.cli, sma_models.language_model, sma_models.inference.generation")

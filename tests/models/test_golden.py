"""Outputs and gradients equal those of the published code, in float64, by every backend.

The files of the published code lie outside the repository, in ``$SMA_GOLDEN`` or in ``shared/golden`` beside it. Small
files of our own, which are always here, hold a later change to what we compute now.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sma.errors import BackendError
from sma.testing.precision import imprecision, known_to
from tests import golden
from tests.devices import DEVICE, needs_triton

ROOT = Path(__file__).parents[2]
OWN = sorted((ROOT / "tests/golden_files").glob("*.npz"))
PUBLISHED_FOLDER = Path(os.environ.get("SMA_GOLDEN") or ROOT.parent / "shared/golden")
PUBLISHED = sorted(PUBLISHED_FOLDER.glob("*.npz"))
ABSENT = pytest.param(
    Path("absent.npz"),
    marks=pytest.mark.skip(reason=f"no golden files of the published code in {PUBLISHED_FOLDER}; SMA_GOLDEN names it"),
)
LAYER = ROOT / "tests/golden_files/own_causal_rotary.npz"
EMA = ROOT / "tests/golden_files/own_ema_causal.npz"
RESULTS = ("active", "probs", "y", "y_step", "state_last", "grad_x")

backends = pytest.mark.parametrize(
    "backend", ["reference", "eager", pytest.param("torch_scatter", marks=pytest.mark.scatter)]
)


def check(path: Path, backend: str) -> None:
    content = golden.read(path)
    found = dict(golden.errors(content, backend))
    assert {name: error for name, error in found.items() if error > golden.TOLERANCE} == {}
    wanted = {name for name in content if name.startswith("grad.")} | {"y", "grad_x"}
    assert wanted <= found.keys()


@backends
@pytest.mark.parametrize("path", PUBLISHED or [ABSENT], ids=lambda path: path.stem)
def test_the_published_code_is_reproduced(path: Path, backend: str) -> None:
    check(path, backend)


@backends
@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_our_own_files_are_reproduced(path: Path, backend: str) -> None:
    check(path, backend)


@needs_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, in Triton's interpreter
@pytest.mark.parametrize("path", [*PUBLISHED, *OWN], ids=lambda path: path.stem)
def test_the_kernels_reproduce_them_in_float32(path: Path) -> None:
    """On the GPU where there is one, and as precisely as eager operations, which do in float64."""
    content = golden.placed(golden.read(path), DEVICE, torch.float32)
    wide = golden.placed(content, DEVICE, torch.float64)
    found, eager, exact = (
        compared(wide, golden.run(*each)) for each in ((content, "triton"), (content, "eager"), (wide, "eager"))
    )
    assert found.keys() == eager.keys() == exact.keys()
    assert found.keys() >= {name for name in content if name.startswith("grad.")} | {"y", "grad_x"}
    known = known_to(lambda moved: [*compared(wide, golden.run(moved, "eager")).values()], [*exact.values()], wide)
    reasons = {
        name: imprecision(found[name], eager[name], exact[name], units, in_16_bits=False)
        for name, units in zip(exact, known, strict=True)
    }
    assert {name: reason for name, reason in reasons.items() if reason is not None} == {}


def compared(content: dict[str, Any], values: dict[str, Any]) -> dict[str, Tensor]:
    """What a golden file holds of ``values``, in float64, without what has no meaning at padding."""
    valid = content.get("valid")
    result = {}
    for name in content:
        if name in values and (name in RESULTS or name.startswith("grad.")):
            value = values[name].double()
            result[name] = value[valid] if valid is not None and name in golden.WITHOUT_MEANING_AT_PADDING else value
    return result


def test_our_own_files_are_those_that_the_script_makes(tmp_path: Path) -> None:
    golden.make(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in OWN]
    for path in OWN:
        assert path.stat().st_size < 60_000
        ours, made = golden.read(path), golden.read(tmp_path / path.name)
        assert ours.keys() == made.keys()
        assert ours["meta"] == made["meta"]


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> str:
    with np.load(source) as file:
        content: dict[str, Any] = {name: file[name] for name in file.files}
    content["meta"] = json.loads(str(content["meta"]))
    change(content)
    if "meta" in content:
        content["meta"] = np.array(json.dumps(content["meta"]))
    np.savez(target, **content)
    return str(target)


@pytest.mark.parametrize("name", ["y", "grad_x", "probs", "active", "grad.mx_proj.weight", "grad.q_router.temp"])
def test_an_entry_that_differs_fails(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: dict[str, Any]) -> None:
        value = content[name]
        value.flat[value.size // 2] = ~value.flat[value.size // 2] if name == "active" else value.mean() + 1e-6

    assert golden.main([str(LAYER), changed(LAYER, tmp_path / "changed.npz", change)]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_not_a_number_fails(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["y"][0, 0, 0] = np.nan

    assert golden.main([changed(LAYER, tmp_path / "changed.npz", change)]) == 1


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["state_last"] += 1e-6

    paths = [str(EMA), changed(EMA, tmp_path / "changed.npz", change)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/golden.py"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    assert "own_ema_causal.npz [eager] y_step " in done.stdout
    assert "state_last 1.0e-06" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--make"], ["--make", "a", "b"]])
def test_wrong_usage_says_how(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(arguments) == 2
    assert "python tests/golden.py FILE..." in capsys.readouterr().err


def _set(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["meta"].update(options)


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(kind="mamba"), "meta.kind: must be one of md_ema, seqboat_layer, got 'mamba'"),
        (_set(windw_size=3), "meta.windw_size: unknown option of seqboat_layer; there are kind, dim"),
        (lambda content: content["meta"].pop("hdim"), "meta.hdim: must be given for seqboat_layer"),
        (_set(norm_type="groupnorm"), "meta.norm_type: must be one of layernorm, batchnorm"),
        (_set(rel_pos_bias="alibi"), "meta.rel_pos_bias: must be one of simple, rotary, got 'alibi'"),
        (_set(attention_activation="max"), "cannot be computed by reference: .*activation: must be one of"),
        (_set(dim=7), "x: must have meta.dim = 7 features, got 6"),
        (_set(zdim=6), "(?s)cannot be computed by reference: .*gamma"),
        (_drop("meta"), "must be a golden file"),
        (_drop("grad_y"), "grad_y: must be in the file"),
        (_drop("param.gamma"), "(?s)cannot be computed by reference: .*gamma"),
        (lambda content: content.update({"param.extra": content["x"]}), "extra: not a weight of a published"),
        (lambda content: content.update({"grad.extra": content["x"]}), "grad.extra: not a parameter of this layer"),
        (lambda content: content.update({"y": content["y"][:, :1]}), r"y: must be \(B, L, D\) like x"),
        (lambda content: content.update({"probs": content["probs"][:1]}), r"probs: must be \(2, 14, 2\), got"),
    ],
    ids=[
        "kind",
        "misspelt",
        "no hdim",
        "norm",
        "positions",
        "activation",
        "dim",
        "zdim",
        "no meta",
        "no grad_y",
        "no weight",
        "more weights",
        "more gradients",
        "other lengths",
        "other batch",
    ],
)
def test_what_is_no_golden_file_is_said(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(LAYER, tmp_path / "changed.npz", change)
    with pytest.raises(golden.GoldenError, match=message):
        list(golden.errors(golden.read(Path(path)), "reference"))
    assert golden.main([path, str(EMA)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{path}: ")
    assert "own_ema_causal.npz [eager]" in captured.out  # the other file is checked all the same


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nothing more", b"text"], ids=["empty", "cut off", "text"])
def test_broken_files_are_said(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    assert golden.main([str(path), str(tmp_path / "missing.npz")]) == 2
    assert capsys.readouterr().err.count("must be a golden file") == 2


def test_a_pickle_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "hostile.npz", meta=np.array([print], dtype=object))
    assert golden.main([str(tmp_path / "hostile.npz")]) == 2
    assert "allow_pickle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"norm_type": norm, "prenorm": prenorm} for norm in golden.NORMS for prenorm in (True, False)]
    + [{"norm_type": "batchnorm", "eval_mode": False}, {"window_size": None}, {"truncation": 1, "local_pos": True}],
    ids=str,
)
def test_any_layer_of_the_format_can_be_checked(options: dict[str, Any]) -> None:
    meta = golden.check_meta({"kind": "seqboat_layer", "bidirectional": True} | golden.COMMON | options)
    content = golden.draw(meta, "left padded", seed=3)
    for backend in golden.BACKENDS:
        assert max(dict(golden.errors(content, backend)).values()) < golden.TOLERANCE


def test_a_norm_without_weights_is_recognised() -> None:
    meta = golden.check_meta({"kind": "seqboat_layer", "bidirectional": True} | golden.COMMON)
    content = golden.draw(meta, "", seed=0)
    content = {name: value for name, value in content.items() if "norm.norm" not in name}
    found = dict(golden.errors(content, "eager"))  # of another layer, so the errors are large
    assert not any("norm" in name for name in found)


def test_a_backend_that_cannot_run_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def errors(content: dict[str, Any], backend: str) -> list[tuple[str, float]]:
        if backend == "torch_scatter":
            raise BackendError("cannot run")
        return [("y", 0.0)]

    monkeypatch.setattr(golden, "errors", errors)
    monkeypatch.setattr(golden, "backends", lambda: ("eager", "torch_scatter"))
    assert golden.main([str(LAYER)]) == 0
    assert "[torch_scatter] not checked: cannot run" in capsys.readouterr().out

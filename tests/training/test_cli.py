"""The command line: what it prints, and that a mistake of the user is one line and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sma_models.cli import main
from sma_models.training.loop import Outcome
from sma_models.training.run import Run

Runner = Callable[..., tuple[Run, Outcome]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command says on stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "lm_stdlb"], "no recipe named 'lm_stdlb'; did you mean 'lm_stdlib'"),
        (["train"], "recipe: must be given"),
        (["train", "lm", "extra"], "arguments: must be one recipe and then key=value, got 'extra'"),
        (["train", "lm", "model.n_layer=2"], "did you mean 'n_layers'"),
        (["train", "lm", "train.steps=-1"], "steps: must be at least 1, got -1"),
        (["train", "lm", "--name", "../up"], "name: must be letters, digits"),
        (["train", "missing.yaml"], "missing.yaml: cannot be read"),
        (["train", "--resume", "nowhere"], "run: must be the folder of a training run, got 'nowhere'"),
        (["eval", "nowhere"], "run: must be the folder of a training run, got 'nowhere'"),
        (["generate", "nowhere"], "run: must be the folder of a training run"),
        (["inspect", "nowhere"], "run: must be the folder of a training run"),
        (["export-hf", "nowhere", "--to", "x"], "run: must be the folder of a training run"),
        (["specs", "seqboat_txt"], "did you mean 'seqboat_text'"),
        (["specs", "seqboat_text", "n_layers=0"], "n_layers: must be at least 1, got 0"),
        (["convert", "x.pt", "--spec", "seqboat_text", "--to", "y.safetensors"], "x.pt: no such file"),
        (["data", "text", "data.root=/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "text", "data.root=/nowhere/at/all", "--name", "x"], "/nowhere/at/all"),
        (["train", "lm"], "files: must name at least one file"),
        (["train", "lm_stdlib", "model=seqboat_text"], "model: must be a LanguageModel for data of the kind 'lm'"),
        (["trian"], "No such command 'trian'"),
        (["train", "--nmae", "x"], "--nmae"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.rglob("*")) == []


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="no recipe named"):
        main(["--debug", "train", "lm_stdlb"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert all(
            command in said for command in ("train", "eval", "generate", "inspect", "plugins", "specs", "convert")
        )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sma ")


def test_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--kind", "data"]) == 0
    said = capsys.readouterr().out
    assert "listops" in said
    assert "tempered_softmax" not in said


def test_specs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["specs"]) == 0
    assert "seqboat_text" in capsys.readouterr().out
    assert main(["specs", "seqboat_small_lm", "n_layers=2"]) == 0
    said = capsys.readouterr().out
    assert "n_layers: 2\n" in said
    assert said.splitlines()[-1].endswith(" parameters")


def test_a_run_from_the_command_line(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["train", tiny, "train.steps=6", "--name", "a", *runs]) == 0
    assert "bits per byte" in capsys.readouterr().out
    run = Run(tmp_path / "runs" / "tiny" / "a")
    assert sorted(path.name for path in run.path.iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "model.safetensors",
        "summary.json",
        "tensorboard",
    ]
    summary = json.loads(run.summary.read_text())
    assert main(["eval", "tiny/a", "--json", *runs]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["loss"] == pytest.approx(summary["test"]["loss"])
    assert main(["generate", "tiny", "--prompt", "line", "-n", "5", "--temperature", "0", *runs]) == 0
    first = capsys.readouterr().out
    assert first.startswith("line")
    assert main(["generate", "tiny", "--prompt", "line", "-n", "5", "--temperature", "0", *runs]) == 0
    assert capsys.readouterr().out == first
    _refusals_of_a_finished_run(run, tiny, runs, capsys)


def _refusals_of_a_finished_run(run: Run, tiny: str, runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert "name: must be new, got 'a'" in refused(capsys, "train", tiny, "--name", "a", *runs)
    assert "only train.device" in refused(capsys, "train", "--resume", "tiny/a", "train.steps=9", *runs)
    assert "recipe: must be 'tiny'" in refused(capsys, "train", "lm", "--resume", "tiny/a", *runs)
    assert "name: must not be given" in refused(capsys, "train", "--resume", "tiny/a", "--name", "b", *runs)
    assert main(["train", "--resume", "tiny/a", *runs]) == 2
    assert "got a finished run" in capsys.readouterr().err
    assert "split: must be one of" in refused(capsys, "eval", "tiny/a", "--split", "dev", *runs)
    assert "temperature: must be 0 or a positive number, got -1.0" in refused(
        capsys, "generate", "tiny/a", "--temperature=-1", *runs
    )
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_broken_weights(tiny: str, run_recipe: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = run_recipe(tiny, "train.steps=6")
    run.weights.write_bytes(run.weights.read_bytes()[:100])
    assert "model.safetensors: not a complete safetensors file" in refused(capsys, "eval", str(run.path))
    run.weights.write_bytes(b"\x80\x04K\x01.")  # a pickle
    assert "model.safetensors: not a complete safetensors file" in refused(capsys, "generate", str(run.path))


def test_generating_with_a_classifier_is_refused(
    cifar: Path, run_recipe: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("train.steps=2", "optimiser.warmup=0", "train.batch_size=4", "model.n_layers=1", "model.d_model=8")
    run, _ = run_recipe("image", *small, f"data.root={cifar}", "data.rows=null", "train.device=cpu")
    assert "model: must be a language model of bytes" in refused(capsys, "generate", str(run.path))


def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    assert main(["data", "lm", f"data.root={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "train" in said
    assert "900" in said


def test_inspect(tiny: str, run_recipe: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = run_recipe(tiny, "train.steps=6")
    assert main(["inspect", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "layer 0" in said
    assert "saved" in said
    assert (run.figures / "text_heat_map.html").stat().st_size > 1000

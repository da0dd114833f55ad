"""Folders for ONNX Runtime and AOTInductor: what runs there is the model, without the library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sma.errors import ConfigError, ExportError
from sma_models.cli import main
from sma_models.integrations.export import export, export_forward, export_prefill, export_step, load, save
from sma_models.language_model import LanguageModel
from sma_models.training.loop import Outcome
from sma_models.training.run import Run
from tests.integrations.export.parts import GAU, activated, model_of
from tests.integrations.export.test_graphs import LAYER, put
from tests.integrations.export.texts import PROMPTS, expected, written, written_alone
from tests.models.tiny import inputs_of
from tests.training.conftest import run_recipe  # noqa: F401  # fixtures, used by their names
from tests.training.conftest import tiny as recipe  # noqa: F401


def test_onnx_runtime_writes_what_the_model_writes(trained: LanguageModel, folder: Path) -> None:
    runner = load(folder, threads=1)
    texts = written(runner, PROMPTS, 200)
    assert texts == expected(trained, PROMPTS, 200)
    assert len(set(texts[0])) > 8, "it says nothing, so everything would be the same"
    assert runner.overflow == 0


def test_onnx_runtime_gives_the_numbers_of_the_model(trained: LanguageModel, folder: Path) -> None:
    runner = load(folder, threads=1)
    logits, state = runner.prefill(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            out = trained(torch.tensor([prompt]), trained.initial_state(1))
        assert out.state is not None
        np.testing.assert_allclose(logits[row], out.logits[0, -1], rtol=1e-5, atol=1e-5)
        for (name, ours), theirs in zip(state.items(), out.state.tensors(), strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-5, atol=1e-5, err_msg=name)
    live = np.array([True, False, True, True, False])
    _, after = runner.step(logits.argmax(-1), state, live)
    for name, each in after.items():
        np.testing.assert_allclose(each[~live], state[name][~live], rtol=1e-6, atol=1e-6, err_msg=name)
    seen = [name for name in after if name.endswith(".seen")]
    assert [(after[name] - state[name]).tolist() for name in seen] == [[1, 0, 1, 1, 0]]


def test_float16_by_onnx_runtime(trained: LanguageModel, tmp_path: Path) -> None:
    model = deepcopy(trained).half()
    runner = load(save({"prefill": export_prefill(model, 2, 20), "step": export_step(model)}, tmp_path / "x"))
    assert runner.about["format"] == "onnx"
    logits, state = runner.prefill(PROMPTS)
    assert logits.dtype == np.float16
    own = model.initial_state(1).named_tensors()
    assert {name: str(each.dtype) for name, each in state.items()} == {
        f"state.{name}": str(each.dtype)[6:] for name, each in own.items()
    }
    assert written(runner, PROMPTS, 200) == expected(model, PROMPTS, 200)


def test_onnx_runtime_is_for_some_dtypes_and_the_cpu(trained: LanguageModel, tmp_path: Path) -> None:
    model = deepcopy(trained).bfloat16()
    message = (
        r"format: must be 'aoti' for a model in torch.bfloat16 on cpu, got 'onnx': ONNX Runtime runs models in "
        r"torch.float32 or torch.float16 on the CPU"
    )
    step = export_step(model, 1)
    with pytest.raises(ConfigError, match=message):
        export(model, tmp_path / "x", format="onnx")
    with pytest.raises(ConfigError, match=message):
        save({"step": step}, tmp_path / "x", format="onnx")
    with pytest.raises(ConfigError, match="graphs: must be in one dtype on one device, got prefill in "):
        save({"prefill": export_prefill(trained, 1, 4), "step": step}, tmp_path / "x")
    with pytest.raises(ConfigError, match="graphs: must be in one dtype on one device, got none"):
        save({}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_prompt_goes_on_from_a_state(folder: Path) -> None:
    runner = load(folder, threads=1)
    whole, _ = runner.prefill(PROMPTS[1:2])
    _, state = runner.prefill([PROMPTS[1][:23]])
    logits, _ = runner.prefill([PROMPTS[1][23:]], state)
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-5)


def test_the_copy_of_the_runner_needs_no_library(trained: LanguageModel, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    said = written_alone(moved, "line 7 is", "--tokens", "30", without=("sma", "sma_models", "torch"))
    assert said == "line 7 is" + bytes(expected(trained, [PROMPTS[0]], 30)[0]).decode() + "\n"


def test_whole_sequences_by_onnx_runtime(tmp_path: Path) -> None:
    """Experts, transforms in both directions, attention in chunks: what the language model does not have."""
    experts = activated(module={"type": "moe", "n_experts": 4, "top_k": 2, "d_hidden": 6})
    parts = [{"mixer": {"type": "ema", "n_state": 3}}, experts, activated(module=GAU | {"chunk": 4, "window": None})]
    model = model_of(parts, n_classes=3)
    save({"forward": export_forward(model, 2, 24)}, tmp_path / "x")
    inputs, lengths = inputs_of(model, 2), torch.tensor([24, 13])
    with torch.no_grad():
        logits = model(inputs, lengths=lengths).logits
    runner = load(tmp_path / "x")
    got = runner.forward(inputs=inputs.numpy(), lengths=lengths.numpy())
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"forward: lengths must be \(2,\), None being the batch, got \(3,\)"):
        runner.forward(inputs=inputs.numpy(), lengths=np.ones(3))


def test_overflow_is_reported(trained: LanguageModel, tmp_path: Path) -> None:
    runner = load(save({"prefill": export_prefill(trained, 1, 20, capacity=0.05)}, tmp_path / "x"), threads=1)
    with pytest.warns(UserWarning, match="active tokens were dropped for lack of capacity; export with a larger one"):
        runner.prefill([PROMPTS[1]])
    assert runner.overflow > 0


def test_without_a_compiler_it_says_so(trained: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none(*_: object) -> str:
        raise torch._inductor.exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ExportError, match=r"step: cannot be compiled by AOTInductor: .*C\+\+"):
        save({"step": export_step(trained, 1)}, tmp_path / "x", format="aoti")
    assert not (tmp_path / "x").exists()


class Bessel(nn.Module):
    """Does what no ONNX operator does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_what_onnx_has_not_is_named(tmp_path: Path) -> None:
    graph = export_step(put(model_of([activated()]), Bessel()), 1)
    with pytest.raises(ExportError, match=rf"{LAYER}.module \(Bessel\): cannot be exported to ONNX: .*bessel_j0"):
        save({"step": graph}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_folders_are_not_overwritten_unasked(trained: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder: must be new or empty"):
        export(trained, folder)
    with pytest.raises(ConfigError, match="format: must be one of onnx, aoti, got 'tflite'"):
        export(trained, tmp_path / "x", format="tflite")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="folder: must be a folder, got the file"):
        export(trained, tmp_path / "file")


def test_bad_folders_and_inputs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder: must be one that was exported and can run here, got .*export.json"):
        load(tmp_path)
    about = json.loads((folder / "export.json").read_text()) | {"version": 99}
    (tmp_path / "export.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="must be of version 2, got 99"):
        load(tmp_path)
    runner = load(folder, threads=1)
    for prompts, message in (
        ([], "must hold at least one, got none"),
        ([[1], []], r"prompts\[1\]: must hold at least"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.prefill(prompts)
    with pytest.raises(ValueError, match="holds no graph 'forward', it holds prefill, step"):
        runner.forward(inputs=np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"step: state.layers.0.mixer.hidden must be .*, got nothing"):
        runner.step(np.zeros(1), {})


@pytest.fixture
def run_and_arguments(
    recipe: str,  # noqa: F811
    run_recipe: Callable[..., tuple[Run, Outcome]],  # noqa: F811
    tmp_path: Path,
) -> tuple[Run, list[str]]:
    """A short run, and the command that exports it."""
    run, _ = run_recipe(recipe, "train.steps=6", "model.n_layers=1")
    return run, ["export", str(run.path), "--to", str(tmp_path / "x"), "--chunk", "16"]


def test_export_of_a_run(
    run_and_arguments: tuple[Run, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = run_and_arguments
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("export.json", "prefill.onnx", "step.onnx", "state.npz", "runner.py"))
    model = run.model()
    assert isinstance(model, LanguageModel)
    assert written(load(tmp_path / "x", threads=1), PROMPTS, 20) == expected(model, PROMPTS, 20)
    assert main(arguments) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_export_of_a_run_in_another_dtype(
    run_and_arguments: tuple[Run, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments = run_and_arguments
    for more, message in (
        (["--device", "abacus"], "device: must be one that this machine has, got 'abacus'"),
        (["--format", "onnx", "--dtype", "bfloat16"], "format: must be 'aoti' for a model in torch.bfloat16 on cpu"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, "--dtype", "float16"]) == 0
    runner = load(tmp_path / "x", threads=1)
    assert runner.initial_state(1)["state.layers.0.activate.members.0.rows.0"].dtype == np.float16
    model = run.model()
    assert isinstance(model, LanguageModel)
    assert written(runner, PROMPTS, 20) == expected(model.half(), PROMPTS, 20)

"""Folders: written by the library or by Transformers, whole or in shards, and loaded by the Auto classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import sma
from sma.errors import ConfigError, SpecError
from sma_models.cli import main
from sma_models.inference.generation import generate
from sma_models.integrations.hf import (
    SMAByteTokenizer,
    SMAForCausalLM,
    SMAForSequenceClassification,
    export,
    from_model,
)
from sma_models.language_model import LanguageModel
from sma_models.training.loop import Outcome
from sma_models.training.run import Run
from tests.integrations.hf.test_models import CLASSIFIERS, LANGUAGE_MODELS
from tests.models.tiny import inputs_of, tiny
from tests.training.conftest import run_recipe  # noqa: F401  # fixtures, used by their names
from tests.training.conftest import tiny as recipe  # noqa: F401

Runner = Callable[..., tuple[Run, Outcome]]


@pytest.mark.parametrize("name", LANGUAGE_MODELS + CLASSIFIERS)
def test_every_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    plain = tiny(name)
    from_model(plain).save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if isinstance(plain, LanguageModel) else AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(loaded.model) is type(plain)
    assert not loaded.training
    assert torch.equal(loaded(inputs_of(plain)).logits, plain(inputs_of(plain)).logits)
    assert loaded.state_dict().keys() == {f"model.{key}" for key in plain.state_dict()}


def test_a_table_that_is_not_saved_is_there_after_loading(tmp_path: Path) -> None:
    plain = sma.build("seqboat_text", "d_model=16", "n_layers=1", "positions=sinusoidal").eval()
    assert set(dict(plain.named_buffers())) - set(plain.state_dict()) == {"positions.frequency"}
    loaded = AutoModelForSequenceClassification.from_pretrained(export(plain, tmp_path / "model"))
    assert torch.equal(loaded(inputs_of(plain)).logits, plain(inputs_of(plain)).logits)


def test_shards(plain: LanguageModel, tmp_path: Path) -> None:
    folder = export(plain, tmp_path / "model", max_shard_size=2000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    tokens = inputs_of(plain)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(plain: LanguageModel, folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tokens = inputs_of(plain)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    written = AutoModelForCausalLM.from_pretrained(export(plain, tmp_path / "other", dtype=dtype))
    assert plain.embedding.weight.dtype == torch.float32
    expected = plain.to(dtype)(tokens).logits
    for model in (loaded, written):
        assert model.dtype == dtype
        assert torch.equal(model(tokens).logits, expected)
    assert loaded.generate(tokens, max_new_tokens=3, do_sample=False).shape == (3, 27)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(folder: Path, plain: LanguageModel, device_map: str | dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    tokens = inputs_of(plain)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_no_part_of_a_model_is_left_on_the_disk(folder: Path, tmp_path: Path) -> None:
    spread = {"model.embedding": "cpu", "model.stack": "disk"}
    with pytest.raises(ConfigError, match=r"device_map: must leave nothing where it .* got cpu, disk for model\.stack"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=spread, offload_folder=tmp_path / "offload")


def test_another_number_of_labels(tmp_path: Path) -> None:
    plain = tiny("seqboat_listops")
    from_model(plain).save_pretrained(tmp_path)
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **labels)
    assert isinstance(model, SMAForSequenceClassification)
    assert model.config.spec["n_classes"] == model.config.num_labels == model.model.config.n_classes == 2
    assert torch.equal(model.model.embedding.weight, plain.embedding.weight)
    head = model.model.head.weight
    assert head.shape[0] == 2
    assert 0 < float(head.detach().std()) < 1, "initialised as the head of a new model is"
    model.save_pretrained(tmp_path / "changed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "changed")
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(again(inputs_of(plain)).logits, model(inputs_of(plain)).logits)


def test_a_folder_loads_where_the_library_was_not_imported(folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "sma_models" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(model).__module__, type(tokenizer).__module__)
model.save_pretrained({str(tmp_path / "again")!r})
tokenizer.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["sma_models.integrations.hf.modeling", "sma_models.integrations.hf.tokenization"]
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert files == {path.name for path in folder.iterdir()}, "saved again, without a copy of the code"


def test_a_broken_folder_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["spec"]["blocks"][0]["type"] = "of_another_plugin"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"blocks\[0\].*of_another_plugin"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_export_leaves_what_is_there(plain: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"folder: must be new or empty, got .*model, which holds something"):
        export(plain, tmp_path / "model")
    with pytest.raises(ConfigError, match="folder: must be a folder, got the file"):
        export(plain, tmp_path / "model" / "notes.txt")
    with pytest.raises(ConfigError, match=r"dtype: must be of floating point, got torch\.int64"):
        export(plain, tmp_path / "other", dtype=torch.int64)
    export(plain, tmp_path / "model", force=True, max_shard_size=2000)
    export(plain, tmp_path / "model", force=True)
    tokens = inputs_of(plain)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits, plain(tokens).logits)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_an_export_that_breaks_off_leaves_nothing(
    plain: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(SMAByteTokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        export(plain, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_comes_with_models_of_bytes_only(tmp_path: Path) -> None:
    assert not (export(tiny("seqboat_small_lm"), tmp_path / "a") / "tokenizer_config.json").exists()
    model = from_model(tiny("seqboat_small_lm"))
    assert model.generation_config.pad_token_id is model.generation_config.bos_token_id is None
    texts = export(sma.build("seqboat_text", "d_model=16", "n_layers=1"), tmp_path / "b")
    assert isinstance(AutoTokenizer.from_pretrained(texts), SMAByteTokenizer)


@pytest.mark.parametrize("finished", [True, False])
def test_export_of_a_run(
    recipe: str,  # noqa: F811
    run_recipe: Runner,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
) -> None:
    run, _ = run_recipe(recipe, "train.steps=6")
    if not finished:
        run.weights.unlink()
        run.summary.unlink()
    folder = tmp_path / "for_transformers"
    assert main(["export-hf", str(run.path), "--to", str(folder)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("config.json", "model.safetensors", "tokenizer_config.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, SMAForCausalLM)
    prompt = AutoTokenizer.from_pretrained(folder)("line 7 is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=20, do_sample=False)[:, 9:]
    assert torch.equal(written, generate(run.model(), prompt["input_ids"], 20, temperature=0))
    assert main(["export-hf", str(run.path), "--to", str(folder)]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert main(["export-hf", str(run.path), "--to", str(folder), "--force", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_what_no_file_holds_is_initialised_as_in_a_new_model(plain: LanguageModel, folder: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    held = {f"model.{name}": tensor for name, tensor in plain.state_dict().items() if ".mixer." not in name}
    torch.manual_seed(3)
    model, info = SMAForCausalLM.from_pretrained(None, config=config, state_dict=held, output_loading_info=True)
    torch.manual_seed(3)
    fresh = SMAForCausalLM(config)
    missing = {name for name in model.state_dict() if ".mixer." in name}
    assert missing
    assert set(info["missing_keys"]) == missing
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name] if name in missing else held[name]), name

"""What version 0.1.0 wrote is read, and gives what it gave then; the names that users write are there.

``README.md`` says how the files were made. They are reached by what users call only, not by modules that may move.
"""

from __future__ import annotations

import csv
import importlib
import json
import pkgutil
import runpy
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import sma
import sma.testing

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "0.1.0"
TRAINING = KEPT / "training"
DATA = f"data.root={TRAINING / 'text.txt'}"
STOPPED, STEPS = 49, 60
MODELS = ["language_model", "hybrid", "classifier", "text_classifier", "retrieval"]
STREAMING = ["language_model", "hybrid"]

# Other machines and releases of PyTorch add up float32 numbers in another order. These results are within 2e-6 of those
# in float64, and initial weights that are off by 2e-7 change the losses of the training by 2e-7 of their size. Two
# tensors that changed places change either by 3e-5 or more.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

Main = Callable[[Sequence[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    """What the command ``sma`` calls, wherever that lies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command: Main = pkgutil.resolve_name(project["scripts"]["sma"])
    return command


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No progress bars between the lines of a test report."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def expected(path: str) -> dict[str, Tensor]:
    """Inputs and results that were kept beside a file or folder."""
    return load_file(KEPT / f"{path}.expected.safetensors")


def run(model: sma.Model, kept: Mapping[str, Tensor], **options: Any) -> Any:
    """The model on the inputs that were kept; the second sequence of a pair is padded where the first one is not."""
    inputs = [kept[name] for name in ("first", "second") if name in kept]
    valid: Any = kept["valid"] if len(inputs) == 1 else (kept["valid"], kept["valid"].flip(0))
    with torch.no_grad():
        return model(*inputs, valid=valid, **options)


def check(out: Any, kept: Mapping[str, Tensor]) -> None:
    """Logits, losses by name, and by the name of the layer which tokens were active with which confidence."""
    found = {"logits": out.logits} | {f"loss {name}": loss for name, loss in out.losses.items()}
    for name, routing in out.routings.items():
        found |= {f"active {name}": routing.active, f"confidence {name}": routing.confidence}
    wanted = {name: tensor for name, tensor in kept.items() if name not in ("first", "second", "valid")}
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str) -> None:
    kept = expected(f"models/{name}")
    model = sma.load(KEPT / f"models/{name}.safetensors")
    assert not model.training
    check(run(model, kept), kept)


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_and_weights_for_it(name: str) -> None:
    kept, weights = expected(f"models/{name}"), KEPT / f"models/{name}.safetensors"
    spec = KEPT / f"models/{name}.yaml"
    assert sma.load_spec(spec) == sma.load(weights).config
    model = sma.build(spec).eval()
    sma.load_into(model, weights)
    check(run(model, kept), kept)


@pytest.mark.parametrize("name", STREAMING)
def test_a_stream_goes_on(name: str) -> None:
    kept = expected(f"states/{name}")
    model = sma.load(KEPT / f"models/{name}.safetensors")
    state = sma.load_state(KEPT / f"states/{name}.safetensors", like=model.initial_state(1))
    with torch.no_grad():
        out = model(kept["first"], state)
    torch.testing.assert_close(out.logits, kept["logits"], **CLOSE)


def test_routings_are_replayed() -> None:
    """On other tokens than those that they were recorded with, where the model itself decides otherwise."""
    kept = expected("routings/language_model")
    model = sma.load(KEPT / "models/language_model.safetensors")
    record = sma.configurators.load_routings(KEPT / "routings/language_model.safetensors")
    check(run(model, kept, replay=record), kept)
    own = run(model, kept).routings
    assert not any(torch.equal(own[name].active, routing.active) for name, routing in record.items())


def test_routings_are_replayed_by_a_spec() -> None:
    path, layer = KEPT / "routings/language_model.safetensors", "layers.0.activate"
    model = sma.build(
        KEPT / "models/language_model.yaml",
        "n_layers=1",
        f"blocks[0].activate.configurator={{type: replay, path: {path}, name: {layer}}}",
        "blocks[0].activate.controller=null",
    )
    found = run(model, expected("routings/language_model")).routings[layer]
    recorded = sma.configurators.load_routings(path)[layer]
    assert torch.equal(found.active, recorded.active)
    assert torch.equal(found.confidence[found.active], recorded.confidence[found.active])


def check_result(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """What an evaluation found."""
    for name in ("loss", "bits_per_byte", "count"):
        assert found[name] == pytest.approx(wanted[name], rel=CLOSE["rtol"]), name
    assert found["activation_rate"].keys() == wanted["activation_rate"].keys()
    for name, rates in wanted["activation_rate"].items():
        assert found["activation_rate"][name] == pytest.approx(rates), name


def rows(folder: Path) -> list[dict[str, str]]:
    """The lines of ``metrics.csv``."""
    with open(folder / "metrics.csv", encoding="ascii", newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_is_judged(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """By its last checkpoint."""
    assert main(["eval", "counting/interrupted", DATA, "--json", "--runs", str(TRAINING)]) == 0
    wanted = json.loads((TRAINING / "interrupted.expected.json").read_text(encoding="utf-8"))
    check_result(json.loads(capsys.readouterr().out), wanted)


def test_an_interrupted_run_goes_on(main: Main, tmp_path: Path) -> None:
    """From the step where it stopped, with the losses that 0.1.0 had when it went on with the same run."""
    folder = tmp_path / "counting" / "interrupted"
    shutil.copytree(TRAINING / "counting/interrupted", folder)
    before = rows(folder)
    assert [row["step"] for row in before] == [str(step) for step in range(1, STOPPED + 1)]
    assert main(["train", "--resume", str(folder), DATA]) == 0
    found, wanted = rows(folder), rows(TRAINING / "counting/finished")
    assert [row["step"] for row in found] == [str(step) for step in range(1, STEPS + 1)]
    assert found[:STOPPED] == before
    for row, kept in zip(found[STOPPED:], wanted[STOPPED:], strict=True):
        for column in kept.keys() - {"seconds"}:
            place = f"{column} of step {kept['step']}"
            assert bool(row[column]) == bool(kept[column]), place
            assert float(row[column] or 0) == pytest.approx(float(kept[column] or 0), rel=CLOSE["rtol"]), place
    found_summary, kept_summary = (
        json.loads((each / "summary.json").read_text(encoding="utf-8"))
        for each in (folder, TRAINING / "counting/finished")
    )
    for split in ("validation", "test"):
        check_result(found_summary[split], kept_summary[split])


def test_a_finished_run_is_judged_and_writes(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["counting/finished", "--runs", str(TRAINING)]
    assert main(["eval", *where, DATA, "--json"]) == 0
    summary = json.loads((TRAINING / "counting/finished/summary.json").read_text(encoding="utf-8"))
    check_result(json.loads(capsys.readouterr().out), summary["test"])
    assert main(["generate", *where, "--prompt", "line 7", "-n", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == (TRAINING / "finished.expected.txt").read_text(encoding="utf-8")


def loader_of(folder: Path) -> dict[str, Any]:
    """The names in the module beside the weights, by which Transformers finds the classes with trust_remote_code."""
    names = runpy.run_path(str(folder / "sma_loader.py"))
    return {name: names[name] for name in names["__all__"]}


def test_a_language_model_for_transformers() -> None:
    folder, kept = KEPT / "hf/language_model", expected("hf/language_model")
    classes = loader_of(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is classes["SMAForCausalLM"]
    assert type(model.config) is classes["SMAConfig"]
    assert type(tokenizer) is classes["SMAByteTokenizer"]
    prompts = tokenizer(["line 7 is", "followed"], return_tensors="pt", padding=True)
    assert all(torch.equal(prompts[name], kept[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        torch.testing.assert_close(model(**prompts).logits, kept["logits"], **CLOSE)
    assert torch.equal(model.generate(**prompts, max_new_tokens=12, do_sample=False), kept["written"])


def test_a_classifier_for_transformers() -> None:
    folder, kept = KEPT / "hf/text_classifier", expected("models/text_classifier")
    classes = loader_of(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is classes["SMAForSequenceClassification"]
    with torch.no_grad():
        logits = model(kept["first"], attention_mask=kept["valid"].long()).logits
    torch.testing.assert_close(logits, kept["logits"], **CLOSE)


PUBLIC = """
    Activated ActivatedConfig BaseConfig Block BlockOutput Configurable Configurator Mixer MixtureConfig Model Module
    ModuleOutput Norm Packed Routing SMAError SparseMixture SparselyActivated State StateHistory WorkingMemory build
    checkpoint configurators dump_spec hookimpl load load_into load_spec load_state ops plugins register save save_state
    spec statistics
"""
TESTING = """
    BlockSuite ConfiguratorSuite MixerSuite ModelSuite ModuleSuite NormSuite OpCase OpSuite Result SequenceSuite
    StockSuite law
"""
COMMANDS = "train eval data generate inspect serve plugins specs convert export export-hf demo"
RECIPES = "enwik8 image listops lm lm_stdlib pathfinder pathx retrieval speech text"
REGISTERED = {
    "configurator": "always expert_choice fixed_rate gumbel_softmax replay sigmoid tempered_softmax top_k",
    "module": "attention ffn gau moe",
    "mixer": "attention_mixer ema",
    "norm": "batchnorm layernorm rmsnorm scalenorm syncbatchnorm",
    "block": "hybrid mega seqboat",
    "model": "classifier language_model retrieval",
    "data": "enwik8 files idx image listops pairs pathfinder speech stdlib text",
    "spec": """
        ema_moe_lm mega_chunk_text mega_lm mega_text mixture_of_depths_lm seqboat_image seqboat_listops seqboat_lm
        seqboat_pathfinder seqboat_pathx seqboat_retrieval seqboat_small_lm seqboat_speech seqboat_text
        seqboat_text_full three_module_lm transformer_lm transformer_text
    """,
}


@pytest.mark.parametrize(("module", "names"), [(sma, PUBLIC), (sma.testing, TESTING)], ids=["sma", "sma.testing"])
def test_public_names(module: Any, names: str) -> None:
    assert set(names.split()) - set(module.__all__) == set()
    assert [name for name in names.split() if not hasattr(module, name)] == []


@pytest.mark.parametrize("kind", REGISTERED)
def test_registered_names(kind: str) -> None:
    registry = sma.plugins.registry()
    assert [name for name in REGISTERED[kind].split() if not registry.has(kind, name)] == []


@pytest.mark.parametrize("command", COMMANDS.split())
def test_commands(main: Main, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: sma {command}" in capsys.readouterr().out


def test_recipes(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "of_no_such_name"]) == 2
    known = capsys.readouterr().err.partition("(known: ")[2].split(", ")
    assert set(RECIPES.split()) - set(known) == set()


def test_names_of_the_distribution() -> None:
    """The command, the group of entry points, and our plugins in it, which ``SMA_BLOCK_PLUGINS`` names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "sparse-modular-activation"
    assert "sma" in project["scripts"]
    assert {"sma", "sma_modules", "sma_models"} <= project["entry-points"]["sma.plugins"].keys()


PLUGIN = """
from dataclasses import dataclass

import sma


class Twice(sma.Module):
    layout = "tokens"

    @dataclass(kw_only=True, frozen=True)
    class Config(sma.Module.Config):
        times: int = 2

    def __init__(self, config, *, d_model, causal=False):
        super().__init__(config, d_model=d_model, causal=causal)
        self.times = config.times

    def forward(self, x):
        return self.times * x


@sma.hookimpl
def sma_register(register):
    register("twice", Twice)
"""


def test_a_plugin_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_for_0_1_0.py").write_text(PLUGIN, encoding="utf-8")
    info = tmp_path / "plugin_for_0_1_0-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-for-0-1-0\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[sma.plugins]\ntwice = plugin_for_0_1_0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = sma.plugins.load_plugins()
    assert [str(failure) for failure in found.failures()] == []
    with sma.plugins.isolated_registry(found):
        spec = {"extends": "transformer_lm", "d_model": 16, "n_layers": 1}
        block = {"type": "hybrid", "sublayers": [{"activate": {"module": {"type": "twice", "times": 3}}}]}
        model = sma.build({**spec, "blocks": [block]}).eval()
        assert model(torch.randint(256, (1, 5))).logits.shape == (1, 5, 256)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("sma_models.decoding", ["Decoder", "Prefilled", "Reader", "prefill"]),
        ("sma_models.generation", ["check_sampling", "generate", "sample", "stream"]),
        ("sma_models.export", ["Exported", "Runner", "export", "export_forward", "export_step", "load", "save"]),
        ("sma_models.hf", ["SMACache", "SMAConfig", "SMAForCausalLM", "export", "from_model"]),
    ],
)
def test_documented_modules_keep_their_names(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []

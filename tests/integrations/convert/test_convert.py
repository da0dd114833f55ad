"""Checkpoints of the published code, made here from our own models, become these models again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import sma
from sma.errors import CheckpointError
from sma.interfaces import Model
from sma_models.integrations.convert import convert, convert_into, read_published
from tests.models.tiny import call, inputs_of, tiny

# Ours to the published names, written down from the published modules and not from our rules.
LAYER = {
    "norm.": "norm.norm.",
    "mixer.": "move.",
    "activate.module.position_bias": "rel_pos_bias.rel_pos_bias",
    "activate.module.": "",
    "activate.configurator.temp": "q_router.temp",
    "skip_proj.": "hx_proj.",
}
ENDS = {"stack.final_norm.": "final_norm.norm.", "embedding.": "embed_tokens.", "positions.scale": "pos_emb.scale"}
HEADS = {"hidden.": "classifier.0.0.", "head.": "sentence_projection_layer."}
FAMILIES = {
    "seqboat_text": "encoder.encoder",
    "seqboat_listops": "encoder.encoder",
    "seqboat_retrieval": "encoder.encoder",
    "seqboat_image": "encoder.encoder",
    "seqboat_pathfinder": "encoder.encoder",
    "seqboat_pathx": "encoder.encoder",
    "seqboat_speech": "encoder.encoder",
    "seqboat_text_full": "encoder.encoder",
    "seqboat_lm": "decoder",
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def renamed(name: str, table: dict[str, str]) -> str | None:
    return next((theirs + name.removeprefix(ours) for ours, theirs in table.items() if name.startswith(ours)), None)


def published(model: Model, name: str) -> dict[str, Tensor]:
    """The weights under the names of the published code, with what else its checkpoints hold."""
    prefix = FAMILIES[name]
    layer = "slag_layer" if prefix == "decoder" else "mega_layer"
    scale_norm = "scalenorm" in str(sma.dump_spec(model.config))
    weights: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key.endswith("balance"):  # of a rate controller, which the published code does not have
            continue
        if key.startswith("stack.layers."):
            number, rest = key.removeprefix("stack.layers.").split(".", 1)
            theirs = f"{prefix}.layers.{number}.{layer}.{renamed(rest, LAYER)}"
        elif renamed(key, HEADS):
            theirs = str(renamed(key, HEADS))
        else:
            theirs = f"{prefix}.{renamed(key, ENDS)}"
        theirs = theirs.replace("norm.norm.weight", "norm.norm.scalar") if scale_norm else theirs
        weights[theirs] = value.clone()
    if prefix == "decoder":
        weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
        weights["decoder.version"] = torch.tensor([3.0])
    if f"{prefix}.pos_emb.scale" in weights:
        weights[f"{prefix}.pos_emb.inv_freq"] = torch.ones(4)
    return weights


def write(weights: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        args = argparse.Namespace(arch="slag_lra_imdb", encoder_layers=2, criterion=None)
        history = [{"criterion_name": "LRACrossEntropyCriterion", "num_updates": 25000}]
        torch.save({"args": args, "model": weights, "optimizer_history": history, "extra_state": {"epoch": 3}}, path)
    return path


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return published(tiny("seqboat_text"), "seqboat_text")


@every_family
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_converted_model_computes_the_same(name: str, suffix: str, tmp_path: Path) -> None:
    source, target = tiny(name), tiny(name, seed=1)
    inputs = inputs_of(source)
    expected = call(source, inputs).logits
    assert not torch.allclose(call(target, inputs).logits, expected)
    convert_into(target, write(published(source, name), tmp_path / f"checkpoint_best{suffix}"))
    assert torch.equal(call(target, inputs).logits, expected)


def test_names_are_those_of_the_published_code(weights: dict[str, Tensor]) -> None:
    """A few by hand, so that the table above is not the only witness."""
    assert {
        "encoder.encoder.embed_tokens.weight",
        "encoder.encoder.layers.1.mega_layer.norm.norm.scalar",
        "encoder.encoder.layers.0.mega_layer.move.delta",
        "encoder.encoder.layers.0.mega_layer.q_router.temp",
        "encoder.encoder.layers.0.mega_layer.rel_pos_bias.rel_pos_bias",
        "encoder.encoder.layers.1.mega_layer.hx_proj.weight",
        "encoder.encoder.layers.1.mega_layer.gamma",
        "classifier.0.0.bias",
        "sentence_projection_layer.weight",
    } <= weights.keys()
    image = published(tiny("seqboat_image"), "seqboat_image")
    assert {
        "encoder.encoder.embed_tokens.bias",
        "encoder.encoder.pos_emb.scale",
        "encoder.encoder.final_norm.norm.running_mean",
        "encoder.encoder.layers.0.mega_layer.norm.norm.num_batches_tracked",
    } <= image.keys()
    assert "decoder.layers.1.slag_layer.move.omega" in published(tiny("seqboat_lm"), "seqboat_lm")


def test_weights_alone_are_read_as_well(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "weights.pt")
    read = read_published(tmp_path / "weights.pt")
    assert read.keys() == weights.keys()


def test_an_output_projection_of_its_own_becomes_the_head(tmp_path: Path) -> None:
    source = tiny("seqboat_lm", tie_embeddings=False)
    weights = published(source, "seqboat_lm")
    del weights["sentence_projection_layer.weight"]
    weights["decoder.output_projection.weight"] = source.state_dict()["head.weight"]
    path = write(weights, tmp_path / "checkpoint.pt")
    target = tiny("seqboat_lm", seed=1, tie_embeddings=False)
    convert_into(target, path)
    inputs = inputs_of(source)
    assert torch.equal(call(target, inputs).logits, call(source, inputs).logits)
    with pytest.raises(CheckpointError, match=r"unexpected: head\.weight"):
        convert_into(tiny("seqboat_lm"), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("classifier.0.0.bias"), r"does not fit the model: missing: hidden\.bias$"),
        (
            lambda w: w.pop("encoder.encoder.layers.1.mega_layer.q_router.temp"),
            r"missing: stack\.layers\.1\.activate\.configurator\.temp$",
        ),
        (lambda w: w.update(extra=torch.ones(1)), "^extra: not a weight of a published SeqBoat model"),
        (
            lambda w: w.update({"encoder.encoder.layers.0.mega_layer.nffn.fc1.weight": torch.ones(1)}),
            r"nffn\.fc1\.weight: not a weight of a published SeqBoat layer",
        ),
        (
            lambda w: w.update({"encoder.encoder.layers.0.nffn.fc1.weight": torch.ones(1)}),
            r"nffn\.fc1\.weight: not a weight of a published SeqBoat model",
        ),
        (
            lambda w: w.update({"encoder.encoder.layers.7.mega_layer.gamma": torch.ones(2, 4)}),
            r"unexpected: stack\.layers\.7\.activate\.configurator\.balance, stack\.layers\.7",
        ),
        (
            lambda w: w.update({"classifier.0.0.bias": torch.ones(5)}),
            r"of another shape: hidden\.bias \(5,\) instead of \(16,\)$",
        ),
        (
            lambda w: w.update({"encoder.encoder.layers.0.mega_layer.ssm.omega": torch.ones(8)}),
            r"ssm\.omega: mixer\.omega is given twice",
        ),
        (
            lambda w: w.update({"decoder.embed_tokens.weight": torch.ones(16, 8)}),
            r"decoder\.embed_tokens\.weight: embedding\.weight is given twice",
        ),
        (lambda w: w.update({"decoder.output_projection.weight": torch.ones(16, 8)}), "of another shape: head.weight"),
    ],
    ids=["weight", "temperature", "extra", "in a layer", "beside", "deeper", "shape", "twice", "both", "projection"],
)
def test_what_does_not_fit_is_named(
    weights: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    change(weights)
    model = tiny("seqboat_text", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        convert_into(model, write(weights, tmp_path / "checkpoint.pt"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_family_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(weights, tmp_path / "checkpoint.pt")
    for name in ("seqboat_image", "seqboat_lm", "seqboat_text_full", "mega_text"):
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: does not fit the model"):
            convert_into(tiny(name), path)


class Hostile:
    """What it names would run if it were unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["args", "model", "weight", "alone"])
def test_a_hostile_pickle_is_refused_and_not_run(
    weights: dict[str, Any], tmp_path: Path, where: str, legacy: bool
) -> None:
    hostile, place = Hostile(tmp_path / "ran"), tmp_path / "ran"
    content: Any = {"args": None, "model": weights}
    if where == "alone":
        content = hostile
    elif where == "weight":
        weights["classifier.0.0.bias"] = hostile
    else:
        content[where] = hostile
    torch.save(content, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a complete checkpoint of tensors"):
        read_published(tmp_path / "checkpoint.pt")
    assert not place.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_that_was_cut_off_or_changed_is_refused(
    weights: dict[str, Tensor], tmp_path: Path, legacy: bool
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for length in [*range(0, 30), *range(30, len(content), len(content) // 30), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: "):
            read_published(path)
    refused = 0
    for place in range(0, 3000, 20):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x2A]) + content[place + 1 :])
        try:
            read_published(path)  # a change within a tensor cannot be told, any other is
        except CheckpointError as error:
            refused += "checkpoint.pt: " in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights"),
        ({"model": {}}, "holds no weights"),
        ({"model": [torch.ones(1)]}, "holds no weights"),
        ([torch.ones(1)], "holds no weights"),
        (torch.ones(1), "holds no weights"),
        ({"model": {"a": 1.0}}, "must hold a dictionary of tensors by name, got float under 'a'"),
        ({"model": {3: torch.ones(1)}}, "must hold a dictionary of tensors by name, got Tensor under 3"),
    ],
    ids=["empty", "empty model", "list in model", "list", "tensor", "number", "name"],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: " + message):
        read_published(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "."])
def test_a_missing_file_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_published(tmp_path / name)


def test_a_projection_without_an_embedding_is_a_head() -> None:
    projection = torch.ones(3, 2)
    assert torch.equal(convert({"decoder.output_projection.weight": projection})["head.weight"], projection)


def test_the_command_writes_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sma_models.cli import app

    source = tiny("seqboat_text")
    (tmp_path / "tiny.yaml").write_text(sma.spec.to_yaml(source.config))
    write(published(source, "seqboat_text"), tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", "checkpoint.pt", "--spec", "tiny.yaml", "--to", "model.safetensors"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    inputs = inputs_of(source)
    assert torch.equal(call(sma.load("model.safetensors"), inputs).logits, call(source, inputs).logits)

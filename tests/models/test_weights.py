"""Weights and spec in one file: written whole or not at all, read whole or refused, and nothing is unpickled."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import sma
from sma.errors import CheckpointError, SMAError, SpecError
from sma.interfaces import Model
from sma.weights import SPEC_KEY, read_tensors, write_tensors
from tests.models.tiny import SPECS, call, inputs_of, tiny

NAME = "seqboat_small_lm"


@pytest.fixture
def model() -> Model:
    loaded: Model = tiny(NAME)
    return loaded


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    sma.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("name", SPECS)
def test_every_model_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    path = tmp_path / "model.safetensors"
    sma.save(model, path)
    loaded = sma.load(path)
    assert not loaded.training
    assert loaded.config == model.config
    assert is_unchanged(loaded, values(model))
    inputs = inputs_of(model)
    assert torch.equal(call(loaded, inputs).logits, call(model, inputs).logits)
    other = tiny(name, seed=1)
    sma.load_into(other, path)
    assert is_unchanged(other, values(model))


def test_other_precisions_are_converted(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    write_tensors({name: v.bfloat16() if v.is_floating_point() else v for name, v in values(model).items()}, path)
    sma.load_into(model, path)
    weight = model.state_dict()["embedding.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


def test_tied_weights_can_be_written(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    tied, other = Tied(), Tied()
    write_tensors(tied.state_dict(), tmp_path / "tied.safetensors")
    sma.load_into(other, tmp_path / "tied.safetensors")
    assert is_unchanged(other, values(tied))


def test_a_layer_that_does_not_know_its_width_takes_it_from_the_file(tmp_path: Path) -> None:
    known = sma.SparselyActivated(nn.ReLU(), d_model=6)
    write_tensors(known.state_dict(), tmp_path / "layer.safetensors")
    lazy = sma.SparselyActivated(nn.ReLU())
    sma.load_into(lazy, tmp_path / "layer.safetensors")
    x = torch.randn(2, 5, 6)
    assert torch.equal(lazy(x).output, known(x).output)
    assert is_unchanged(lazy, values(known))


def test_a_file_that_was_cut_off_is_refused_at_any_length(model: Model, saved: Path, tmp_path: Path) -> None:
    content, before = saved.read_bytes(), values(model)
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, 40), *range(40, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a complete safetensors file"):
            sma.load(path)
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            sma.load_into(model, path)
    assert is_unchanged(model, before)


def test_a_header_with_other_bytes_is_refused_or_read(saved: Path, tmp_path: Path) -> None:
    """Whatever is wrong with the header, there is no other error than ours."""
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    path = tmp_path / "changed.safetensors"
    refused = read = 0
    places = range(0, header, max(header // 150, 1))
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0x15
        path.write_bytes(changed)
        try:
            sma.load(path)
        except SMAError as error:
            refused += "changed.safetensors" in str(error)
        else:
            read += 1  # a change that means nothing, in white space
    assert refused + read == len(places)
    assert refused > 100


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _rename(tensors: dict[str, Tensor]) -> None:
    tensors["more"] = tensors.pop("embedding.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("embedding.weight"), r"missing: embedding\.weight$"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected: extra$"),
        (
            lambda tensors: tensors.update({"embedding.weight": torch.zeros(16, 9)}),
            r"of another shape: embedding\.weight \(16, 9\) instead of \(16, 8\)$",
        ),
        (
            lambda tensors: tensors.update({"embedding.weight": torch.zeros(16, 8, dtype=torch.int64)}),
            r"of another kind of numbers: embedding\.weight torch\.int64 instead of torch\.float32$",
        ),
        (
            lambda tensors: tensors.update({"embedding.weight": torch.zeros(16, 8, dtype=torch.complex64)}),
            r"of another kind of numbers: embedding\.weight torch\.complex64",
        ),
        (dict.clear, r"missing: embedding\.weight, .* and \d+ more$"),
        (
            _rename,
            r"missing: embedding\.weight; unexpected: more$",
        ),
    ],
    ids=["missing", "unexpected", "shape", "integers", "complex", "empty", "renamed"],
)
def test_weights_that_do_not_fit_are_listed(
    model: Model, saved: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors, metadata = read_tensors(saved)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    write_tensors(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"changed\.safetensors: does not fit the model: " + message):
        sma.load(path)
    other = tiny(NAME, seed=1)
    before = values(other)
    with pytest.raises(CheckpointError, match=message):
        sma.load_into(other, path)
    assert is_unchanged(other, before)


@pytest.mark.parametrize("name", ["seqboat_lm", "transformer_lm", "seqboat_text", "seqboat_retrieval"])
def test_a_checkpoint_of_another_spec_is_refused(saved: Path, name: str) -> None:
    other = tiny(name)
    before = values(other)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not fit the model: missing|unexpected"):
        sma.load_into(other, saved)
    assert is_unchanged(other, before)


BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30))


class Hostile:
    """What it names would run if it were unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(model: Model, tmp_path: Path, how: str) -> None:
    path, place = tmp_path / "model.safetensors", tmp_path / "ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Hostile(place)))
    else:
        torch.save({"embedding.weight": Hostile(place)}, path)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        sma.load(path)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        sma.load_into(model, path)
    assert not place.exists()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("type: langauge_model", SpecError, "langauge_model.*did you mean 'language_model'"),
        ("type: os.system", SpecError, "os.system"),
        ("extends: /etc/passwd", SpecError, "/etc/passwd"),
        ("extends: ../secret.yaml", SpecError, "a spec given as text may extend registered specs only"),
        ("type: !!python/object/apply:os.mkdir [ran]", SpecError, "tag"),
        ("type: gau", SpecError, "gau"),
        ("- 1", SpecError, "a spec is a mapping"),
        ("", SpecError, "a spec is a mapping"),
        ("\x00", SpecError, "model.safetensors"),
        (BOMB, SpecError, "model.safetensors"),
        ("extends: seqboat_small_lm\nd_model: ${oc.env:HOME}", SpecError, "d_model"),
        ("extends: seqboat_small_lm\nd_model: ${vocab_size}\nvocab_size: ${d_model}", SpecError, "d_model"),
        ("extends: seqboat_small_lm\nd_model: 0", SMAError, "d_model"),
        ("extends: seqboat_small_lm", CheckpointError, "does not fit the model"),
        ("extends: seqboat_small_lm\nd_model: 9223372036854775807", CheckpointError, "its spec cannot be built here"),
        ("extends: seqboat_small_lm\nvocab_size: 1000000000000000", CheckpointError, "its spec cannot be built here"),
    ],
    ids=range(16),
)
def test_a_spec_that_asks_for_more_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch, spec: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(saved.parent)
    tensors, _ = read_tensors(saved)
    save_file(tensors, saved, {SPEC_KEY: spec})
    with pytest.raises(error, match=message) as caught:
        sma.load(saved)
    assert str(saved) in str(caught.value)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_weights(model: Model, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        sma.save(model, tmp_path / "model.safetensors")
        sma.save(model, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("layers", [10**9, 10**5, 900])
def test_weights_are_compared_before_a_model_of_another_depth_is_built(
    saved: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    tensors, _ = read_tensors(saved)
    save_file({"x": next(iter(tensors.values()))}, saved, {SPEC_KEY: f"extends: {NAME}\nn_layers: {layers}"})
    monkeypatch.setattr("sma.spec.sizes._memory", lambda device: None)  # of a machine of any size
    monkeypatch.setattr(nn.Linear, "reset_parameters", _only_on_meta)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"cannot be built here \(parameters: must be at most 1, got more"):
        sma.load(saved)
    assert time.process_time() - started < 5


def _only_on_meta(linear: nn.Linear) -> None:
    assert linear.weight.device.type == "meta"


def test_a_file_without_a_spec_says_what_to_do(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: holds no spec; build the model and"):
        sma.load(path)
    sma.load_into(model, path)


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_what_is_no_file_is_said(model: Model, tmp_path: Path, what: str) -> None:
    path = tmp_path / "nothing.safetensors"
    if what == "folder":
        path.mkdir()
    for load in (sma.load, lambda path: sma.load_into(model, path)):
        with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no such file"):
            load(path)


def test_a_failing_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written .*No space left"):
        sma.save(tiny(NAME, seed=1), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == content
    assert [path.name for path in saved.parent.iterdir()] == ["model.safetensors"]
    sma.save(tiny(NAME, seed=1), saved)
    assert saved.read_bytes() != content


@pytest.mark.parametrize("target", ["missing/model.safetensors", "."])
def test_a_place_that_cannot_be_written_is_said(model: Model, tmp_path: Path, target: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        sma.save(model, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        assert set(file.metadata()) == {SPEC_KEY}
        assert "embedding.weight" in file.keys()  # noqa: SIM118

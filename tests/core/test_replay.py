"""Routings on disk and back, and what is no file of routings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sma.configurators import Replay, load_routings, save_routings
from sma.errors import DataError, RoutingError
from sma.layer import SparselyActivated, SparseMixture
from sma.routing import Routing


def recorded(left: bool = False) -> tuple[SparselyActivated, torch.Tensor, torch.Tensor, Any]:
    layer, x = SparselyActivated(nn.Linear(4, 4)), torch.randn(2, 6, 4)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, slice(0, 2) if left else slice(4, 6)] = False
    return layer, x, valid, layer(x, valid=valid)


def test_routings_survive_the_disk(tmp_path: Path) -> None:
    _, _, _, out = recorded()
    save_routings(tmp_path / "r.safetensors", {"layers.0.activate": out.routing, "layers.1": out.routing})
    loaded = load_routings(tmp_path / "r.safetensors")
    assert list(loaded) == ["layers.0.activate", "layers.1"]
    for part in ("active", "confidence", "valid", "position"):
        assert torch.equal(getattr(loaded["layers.1"], part), getattr(out.routing, part))


def test_the_configurator_repeats_a_file_whatever_the_padding(tmp_path: Path) -> None:
    layer, x, valid, out = recorded(left=True)
    save_routings(tmp_path / "r.safetensors", {"a": out.routing})
    configurator = Replay.Config(path=str(tmp_path / "r.safetensors"), name="a").build(n_modules=1)
    again = SparselyActivated(layer.module, configurator)
    torch.testing.assert_close(again(x, valid=valid).output, out.output)
    right = torch.where(valid[1, :, None], x[1], 0)[2:]
    moved = x.clone()
    moved[1, :4] = right
    y = again(moved, valid=valid.flip(1)).output
    torch.testing.assert_close(y[1, :4], out.output[1, 2:])


def test_a_replayed_decision_has_no_gradient() -> None:
    layer, x, _, out = recorded()
    replaying = SparselyActivated(layer.module, Replay.of(out.routing))
    assert not replaying(x).routing.confidence.requires_grad
    assert replaying.router is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no such file of routings"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a complete safetensors file"),
        (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
        (lambda path: path.write_text("active: all of them"), "not a complete safetensors file"),
        (lambda path: save_file({"weight": torch.zeros(2)}, str(path)), "not a file of routings"),
        (
            lambda path: save_file({"a.active": torch.zeros(1, 1, 1)}, str(path)),
            "lacks a.confidence, a.valid, a.position",
        ),
        (lambda path: save_file({}, str(path)), "lacks any tensor"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "r.safetensors"
    save_routings(path, {"a": recorded()[3].routing})
    spoil(path)
    with pytest.raises(DataError, match=message) as caught:
        load_routings(path)
    assert str(path) in str(caught.value)


def test_a_replay_for_something_else_is_refused(tmp_path: Path) -> None:
    _, _, _, out = recorded()
    path = str(tmp_path / "r.safetensors")
    save_routings(path, {"a": out.routing})
    with pytest.raises(RoutingError, match="no routing named 'b'; there are a"):
        Replay.Config(path=path, name="b").build(n_modules=1)
    with pytest.raises(RoutingError, match="the layer has 2 modules, the routing 1"):
        Replay.Config(path=path, name="a").build(n_modules=2)
    layer = SparseMixture([nn.Linear(4, 4)], Replay.of(out.routing))
    with pytest.raises(RoutingError, match="recorded for a batch of 2, asked for a batch of 3"):
        layer(torch.randn(3, 6, 4))
    with pytest.raises(RoutingError, match="recorded for 6 tokens, asked for position 6"):
        layer(torch.randn(2, 7, 4))


@pytest.mark.parametrize(
    ("active", "confidence", "valid", "message"),
    [
        (torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), torch.ones(2, 3), "active: must be a bool tensor"),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3), torch.ones(2, 3), r"got torch.bool \(2, 3\)"),
        (torch.zeros(2, 3, 1, dtype=torch.bool), torch.zeros(2, 3, 2), torch.ones(2, 3), "must agree"),
        (torch.zeros(2, 3, 1, dtype=torch.bool), torch.zeros(2, 3, 1), torch.ones(2, 4), "must agree"),
    ],
)
def test_routings_that_do_not_fit_together_are_refused(active: Any, confidence: Any, valid: Any, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        Routing(active, confidence, valid.bool(), torch.zeros(2, 3, dtype=torch.int64))

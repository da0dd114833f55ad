"""Sizes that cannot be: one typed error that names the field, before anything is allocated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sma
from sma.errors import SizeError, SpecError
from sma.interfaces import Norm
from sma.plugins import Registry, isolated_registry
from sma.spec.sizes import Size, blueprint

SMALL = ("seqboat_small_lm", "n_layers=2", "d_model=16")
MODULE = "blocks[0].activate.module"


@pytest.fixture
def registry() -> Iterator[Registry]:
    """What is installed, to register more for one test."""
    with isolated_registry() as registry:
        yield registry


@pytest.fixture
def nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an error of building anything but a blueprint."""
    monkeypatch.setattr(nn.Embedding, "reset_parameters", _only_on_meta)


def _only_on_meta(embedding: nn.Embedding) -> None:
    assert embedding.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("vocab_size", value) for value in (10**12, 2**62, 2**63 - 1)),
        *(("d_model", value) for value in (10**9, 2**62)),
        *(("n_layers", value) for value in (10**6, 10**9, 2**63 - 1)),
        *(("blocks[0].mixer.n_state", value) for value in (10**12, 2**63 - 1)),
        *((f"{MODULE}.d_qk", value) for value in (10**12, 2**62)),
        *((f"{MODULE}.d_v", value) for value in (10**12, 2**62)),
    ],
)
@pytest.mark.usefixtures("nothing_is_allocated")
def test_what_the_machine_cannot_hold_is_refused(field: str, value: int) -> None:
    started = time.process_time()
    with pytest.raises(SizeError) as caught:
        sma.build(*SMALL, f"{field}={value}")
    assert str(caught.value).startswith(f"{field}: must ")
    assert f"got {value}" in str(caught.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("field", ["vocab_size", "d_model", "n_layers", "blocks[0].mixer.n_state", f"{MODULE}.window"])
def test_integers_beyond_64_bits_are_refused(field: str) -> None:
    with pytest.raises(SpecError, match="expected an integer of 64 bits, got 1180591620717411303424"):
        sma.build(*SMALL, f"{field}={2**70}")


def test_configurations_made_in_python_are_checked_as_well() -> None:
    config: Any = replace(sma.load_spec(*SMALL), vocab_size=2**70)  # type: ignore[call-arg]
    with pytest.raises(SizeError, match=rf"^vocab_size: must give sizes from 0 to 2\*\*63 - 1, got {2**70}"):
        sma.build(config)
    with pytest.raises(SizeError, match=rf"^d_model: must .* got {2**40}"):
        sma.build("gau", d_model=2**40, causal=True)


def test_a_blueprint_counts_what_the_model_holds() -> None:
    model = sma.build(*SMALL)
    sketch = blueprint(model.config)
    assert sketch is not None
    assert {each.device.type for each in sketch.parameters()} == {"meta"}
    assert Size.of(sketch) == Size.of(model)
    assert Size.of(model).parameters == sum(each.numel() for each in model.parameters())
    assert Size.of(model, model) == Size.of(model), "tied tensors are counted once"


def test_counting_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    direct = sma.load_spec(*SMALL).build()
    torch.manual_seed(3)
    counted = sma.build(*SMALL)
    assert all(map(torch.equal, direct.state_dict().values(), counted.state_dict().values()))


def test_on_the_device_meta_nothing_is_too_large() -> None:
    with torch.device("meta"):
        assert Size.of(sma.build(*SMALL, "vocab_size=1000000000000")).parameters > 10**12


def test_the_device_decides_how_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma.spec.sizes._memory", lambda device: 10_000)
    with pytest.raises(SizeError, match=r"must fit the memory of the device, 0\.0 GiB, got"):
        sma.build(*SMALL)


def test_a_part_that_reads_its_tensors_is_built_all_the_same(registry: Registry) -> None:
    class Curious(Norm):
        """Reads a number while it is built, which the device meta cannot give."""

        @dataclass(kw_only=True, frozen=True)
        class Config(Norm.Config):
            pass

        def __init__(self, config: Config, *, d_model: int) -> None:
            super().__init__(config, d_model=d_model)
            self.scale = nn.Parameter(torch.ones(d_model))
            self.total = float(self.scale.sum())

        def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            return x * self.scale

    registry.register("curious", Curious)
    assert blueprint(Curious.Config(), d_model=4) is None
    assert sma.build("curious", d_model=4).total == 4.0

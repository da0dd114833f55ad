"""A wrapper of PyTorch around any layer: compiled, or recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sma.interfaces import Block, Configurator, Mixer, Module, Norm
from sma.layer import SparseMixture
from tests.tools.parts import PARTS, Part, trained, ways_of
from tests.tools.tools import substitute

LAYERS = (Block, Mixer, Module, Norm, SparseMixture, Configurator, nn.Linear, nn.Embedding)
"""What is wrapped, one of each class of a model."""


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The first submodule of every class, in every place that it may have; the whole is not among them."""
    found: dict[tuple[type, str], str] = {}
    for name, each in module.named_modules():
        if name and isinstance(each, LAYERS):
            place = ".".join(word for word in name.split(".") if not word.isdigit())
            found.setdefault((type(each), place), name)
    return {name: module.get_submodule(name) for name in found.values()}


def recomputed(module: nn.Module, name: str) -> None:
    substitute(module, name, checkpoint_wrapper(module.get_submodule(name)))


def compiled(module: nn.Module, name: str) -> None:
    substitute(module, name, torch.compile(module.get_submodule(name), backend="eager"))  # type: ignore[arg-type]


def compiled_in_place(module: nn.Module, name: str) -> None:
    module.get_submodule(name).compile(backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module, str], None]] = {
    "checkpoint_wrapper": recomputed,
    "torch.compile": compiled,
    "layer.compile": compiled_in_place,
}


@pytest.mark.parametrize("part", [part for part in PARTS if layers(part.build())], ids=str)
def test_checkpoint_wrapper(part: Part) -> None:
    check(part, "checkpoint_wrapper", list(layers(part.build())))


COMPILED = (
    "spec-seqboat_small_lm",
    "spec-mega_lm",
    "spec-three_module_lm",
    "spec-mixture_of_depths_lm",
    "spec-seqboat_text",
)
"""Compiling takes seconds: these hold a layer of every class."""


# Dynamo looks at it on every tensor that comes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wrapper", ["torch.compile", "layer.compile"])
@pytest.mark.parametrize("part", [part for part in PARTS if str(part) in COMPILED], ids=str)
def test_compiled(part: Part, wrapper: str) -> None:
    torch.compiler.reset()
    check(part, wrapper, list(layers(part.build())))


def check(part: Part, wrapper: str, names: list[str]) -> None:
    """Wrap one layer after the other: training, then every way of running it, the same as without."""
    plain = part.build()
    expected = {name: way(part, plain) for name, way in ways_of(part, plain).items()}
    trained(part, plain)
    wrong = []
    for name in names:
        module: Any = part.build()
        way_name = "wrapping"
        try:
            WRAPPERS[wrapper](module, name)
            way_name = "training"
            trained(part, module)
            for own, one, other in zip(
                (key for key, _ in plain.named_parameters()), module.parameters(), plain.parameters(), strict=True
            ):
                assert (one.grad is None) == (other.grad is None), f"gradient of {own}: {one.grad}"
                if one.grad is not None:
                    torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)
            for way_name, way in ways_of(part, plain).items():
                torch.testing.assert_close(way(part, module), expected[way_name], rtol=1e-9, atol=1e-9)
        except Exception as error:
            wrong.append(f"{wrapper} around {name}: {way_name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)

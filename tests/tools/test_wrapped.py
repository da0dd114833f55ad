"""A wrapper of PyTorch around any layer: compiled, or recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sma.interfaces import Block, Configurator, Mixer, Module, Norm
from sma.layer import SparseMixture
from sma_models.seqboat import SeqBoat
from sma_modules.mixers.ema import EMA
from sma_modules.norms import BatchNorm, LayerNorm
from tests.tools.parts import PARTS, Part, of_type, trained, ways_of
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


COMPILED = ("seqboat_small_lm", "mega_lm", "three_module_lm", "mixture_of_depths_lm")


IN_PLACE = (SeqBoat, EMA, LayerNorm, nn.Linear)
"""One of a kind is compiled in place as well: the module stays the same object."""


def one_of_each_class() -> Iterator[Any]:
    """Compiling takes seconds: a layer of every class, in the first of these models that has one."""
    seen: set[type] = set()
    models = {part.name: part for part in PARTS if part.kind == "spec"}
    for part in map(models.__getitem__, COMPILED):
        for name, each in layers(part.build()).items():
            if type(each) not in seen:
                seen.add(type(each))
                yield pytest.param(part, name, "torch.compile", id=f"{type(each).__name__}-{name}")
                if type(each) in IN_PLACE:
                    yield pytest.param(part, name, "layer.compile", id=f"{type(each).__name__}-{name}-in-place")


# Dynamo looks at it on every tensor that comes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("part", "name", "wrapper"), list(one_of_each_class()))
def test_compiled(part: Part, name: str, wrapper: str) -> None:
    torch.compiler.reset()
    check(part, wrapper, [name], without=("whole", "chunks"))


def check(part: Part, wrapper: str, names: list[str], without: tuple[str, ...] = ()) -> None:
    """Wrap one layer after the other: training, then every way of running it, the same as without."""
    plain = part.build()
    ways = {name: way for name, way in ways_of(part, plain).items() if name not in without}
    trained(part, plain)
    expected = {name: way(part, plain) for name, way in ways.items()}  # after it: running averages move
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
            if wrapper == "checkpoint_wrapper":
                once(plain, module)
            for way_name, way in ways.items():
                torch.testing.assert_close(way(part, module), expected[way_name], rtol=1e-9, atol=1e-9)
        except Exception as error:
            wrong.append(f"{wrapper} around {name}: {way_name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def once(plain: nn.Module, module: nn.Module) -> None:
    """PyTorch runs a forward twice, so that batches count twice in the running averages of a batch norm inside, its
    own too; ``checkpoint: true`` of a model counts them once. Take those of the plain part.
    """
    for one, other in zip(of_type(plain, BatchNorm), of_type(module, BatchNorm), strict=True):
        assert int(other.num_batches_tracked) - int(one.num_batches_tracked) in (0, 1)
        other.load_state_dict(one.state_dict())

"""Hooks fire on every part that computes, in every way of running it, and what they change counts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sma.interfaces import Configurator
from sma_models.inference import Decoder
from sma_models.language_model import LanguageModel
from sma_models.retrieval import Retrieval
from tests.tools.parts import PARTS, Part, stepped, trained, ways_of

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
OWN = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)
NO_INPUT = "Full backward hook is firing when gradients are computed with respect to module outputs"
"""PyTorch says so of every hook on an embedding, whose inputs are tokens."""
GLOBAL = tuple(name.replace("register_", "register_module_") for name in OWN)
every_part = pytest.mark.parametrize("part", PARTS, ids=str)


def computing(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that compute, the whole included, by name."""
    found = {name: each for name, each in module.named_modules() if type(each) not in CONTAINERS}
    return found


@contextmanager
def counted(
    module: nn.Module, *, everywhere: bool = False, backward: bool = False
) -> Iterator[dict[str, Counter[str]]]:
    """Counts the calls of each kind of hook by the name of the submodule; ``everywhere`` by hooks for all modules."""
    names = {each: name for name, each in module.named_modules()}
    counts: dict[str, Counter[str]] = {
        kind: Counter() for kind in ("pre", "forward", "differentiable", "backward pre", "backward")
    }

    def count(kind: str) -> Callable[..., None]:
        def hook(owner: nn.Module, *values: Any) -> None:
            if owner in names:
                counts[kind][names[owner]] += 1
                if kind == "forward" and differentiable(values[-1]):
                    counts["differentiable"][names[owner]] += 1

        return hook

    handles = []
    for register in GLOBAL if everywhere else OWN:
        if ("backward" in register) > backward:
            continue
        kind = register.removeprefix("register_").removeprefix("module_").removesuffix("_hook")
        hook = count(kind.removeprefix("full_").replace("_", " ").replace("forward pre", "pre"))
        if everywhere:
            handles.append(getattr(torch_module, register)(hook))
        else:
            handles += [getattr(each, register)(hook) for each in names]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def differentiable(value: Any) -> bool:
    """Whether a gradient can come back through it."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, tuple):
        return any(map(differentiable, value))
    if is_dataclass(value):
        return any(differentiable(getattr(value, field.name)) for field in fields(value))
    return False


def check_forward(counts: dict[str, Counter[str]], expected: dict[str, nn.Module], way: str) -> list[str]:
    """What is wrong with the counts of the forward hooks."""
    wrong = [f"{way}: {name or 'the whole'}: never called" for name in expected if not counts["forward"][name]]
    for name in expected:
        pre, forward = counts["pre"][name], counts["forward"][name]
        stopped = way == "training" and pre == 2 * forward  # a block is recomputed up to its last saved tensor
        if pre != forward and not stopped:
            wrong.append(f"{way}: {name}: {pre} pre-hooks and {forward} hooks")
    return wrong


@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
@every_part
def test_hooks_fire(part: Part, everywhere: bool) -> None:
    module = part.build()
    wrong = []
    for name, way in ways_of(part, module).items():
        with counted(module, everywhere=everywhere) as counts:
            if name == "steps":  # of these alone, not of the prompt
                stepped(part, module, lambda: [each.clear() for each in counts.values()] and None)
            else:
                way(part, module)
        wrong += check_forward(counts, computing(module), name)
        if name == "whole" and not isinstance(module, Retrieval):
            often = {own: n for own, n in counts["forward"].items() if n > 1}
            wrong += [f"whole: {own}: called {n} times" for own, n in often.items() if not own.endswith("dropout")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
@every_part
def test_hooks_fire_in_training(part: Part, everywhere: bool) -> None:
    module = part.build()
    for dropout in (each for each in module.modules() if isinstance(each, nn.Dropout)):
        dropout.p = 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with counted(module, everywhere=everywhere, backward=True) as counts:
            trained(part, module)
    messages = {str(each.message) for each in caught}
    wrong = sorted(f"training: {message}" for message in messages if not message.startswith(NO_INPUT))
    wrong += check_forward(counts, computing(module), "training")
    for name in computing(module):
        calls, pre, full = (counts[kind][name] for kind in ("differentiable", "backward pre", "backward"))
        if calls and not (pre and full):
            wrong.append(f"training: {name or 'the whole'}: {pre} backward pre-hooks and {full} backward hooks")
    assert not wrong, "\n".join(wrong)


def changed(value: Any) -> Any:
    """``value`` with its first floating point tensor changed, unevenly; integers are tokens."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            noise = torch.randn(value.shape[-1:], generator=torch.Generator().manual_seed(value.shape[-1]))
            return value * 1.1 + 0.5 * noise.to(value)
        return (value + 1) % 11 if value.dtype == torch.int64 else value
    if isinstance(value, tuple) and value:
        first = changed(value[0])
        return value._replace(**{value._fields[0]: first}) if hasattr(value, "_fields") else (first, *value[1:])
    if is_dataclass(value) and not isinstance(value, type):
        name = fields(value)[0].name
        return replace(value, **{name: changed(getattr(value, name))})
    return value


def repeated(module: nn.Module, name: str) -> bool:
    """Whether it lies in a layer of a form that another layer has already."""
    head, _, rest = name.partition("stack.layers.")
    return bool(rest) and not head and int(rest.split(".")[0]) >= len(module.config.blocks)  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize(
    ("part", "before"),
    [
        *(pytest.param(part, False, id=f"{part}-output") for part in PARTS),
        *(pytest.param(part, True, id=f"{part}-input") for part in PARTS if part.suite is not None),
    ],
)
def test_a_hook_changes_the_result(part: Part, before: bool) -> None:
    """Of one submodule after the other: all others are plain."""
    module = part.build()
    wrong = []
    for way_name, way in ways_of(part, module).items():
        if way_name == "generate" or (part.suite is None and way_name == "chunks"):
            continue  # tokens may be the same; a block of the same form was tried
        plain = way(part, module)
        for name, each in computing(module).items():
            if repeated(module, name) or (before and isinstance(each, Configurator) and not each.logits_per_module):
                continue  # a configurator that is fixed does not look at its input
            if before:
                handle = each.register_forward_pre_hook(lambda _, args: changed(args))
            else:
                handle = each.register_forward_hook(lambda _, args, output: changed(output))
            try:
                result = way(part, module)
            finally:
                handle.remove()
            if result.shape == plain.shape and torch.equal(result, plain):
                wrong.append(f"{way_name}: {name or 'the whole'}: changed, and the result is the same")
    assert not wrong, "\n".join(wrong)


@every_part
def test_a_hook_that_changes_nothing_changes_nothing(part: Part) -> None:
    """The called path beside the fused one: the same results, outputs and gradients."""
    plain, hooked = part.build(), part.build()
    for each in hooked.modules():
        each.register_forward_hook(lambda *_: None)
    for name, way in ways_of(part, plain).items():
        torch.testing.assert_close(way(part, hooked), way(part, plain), rtol=1e-9, atol=1e-9, msg=f"{name} differs")
    trained(part, plain)
    trained(part, hooked)
    for (name, one), other in zip(hooked.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), f"gradient of {name}"
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9, msg=f"gradient of {name} differs")


@pytest.mark.parametrize("part", [part for part in PARTS if isinstance(part.build(), LanguageModel)], ids=str)
def test_hooks_fire_in_a_decoder_that_was_there_before(part: Part) -> None:
    module = part.build()
    x = part.inputs(module)
    decoder = Decoder(module, len(x))
    decoder.join_all(x[:, :5])
    decoder.step(x[:, 5])
    with counted(module) as counts:
        for t in range(6, x.shape[1]):
            decoder.step(x[:, t])
    wrong = check_forward(counts, computing(module), "steps")
    assert not wrong, "\n".join(wrong)

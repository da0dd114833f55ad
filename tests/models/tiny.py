"""Models of every shipped spec, made small: the same parts in the same places, a few features wide."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

import sma
from sma.configurable import BaseConfig
from sma.interfaces import Model
from sma_models.classifier import Classifier
from sma_models.language_model import LanguageModel
from sma_models.model_io import ModelOutput
from sma_models.retrieval import Retrieval

SPECS = sorted(
    path.name.removesuffix(".yaml")
    for path in files("sma_models").joinpath("specs").iterdir()
    if path.name.endswith(".yaml")
)
VOCABULARY = 16
# At most this much of each: windows, chunks and truncations end within a sequence of 24 tokens.
MOST = {
    "d_model": 8,
    "d_qk": 4,
    "d_v": 12,
    "d_hidden": 12,
    "n_heads": 2,
    "n_state": 3,
    "n_experts": 4,
    "window": 5,
    "chunk": 4,
    "truncation": 7,
    "max_positions": 10,
    "vocab_size": VOCABULARY,
}


def shrink(value: Any, **changes: Any) -> Any:
    """A configuration with every size in it made small, and ``changes`` to the outermost one."""
    if isinstance(value, tuple):
        return tuple(shrink(each) for each in value)
    if not (is_dataclass(value) and isinstance(value, BaseConfig)):
        return value
    small: dict[str, Any] = {}
    for field in fields(value):
        inner = getattr(value, field.name)
        most = MOST.get(field.name)
        small[field.name] = min(inner, most) if isinstance(inner, int) and most else shrink(inner)
    if "n_layers" in small:
        small["n_layers"] = max(2, len(small["blocks"]))
    return replace(value, **(small | changes))


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model of a shipped spec, made small, in evaluation mode; a copy for every caller."""
    return deepcopy(_tiny(name, seed, **changes))


@cache
def _tiny(name: str, seed: int, **changes: Any) -> Model:
    torch.manual_seed(seed)
    model: Model = shrink(sma.load_spec(name, kind="model"), **changes).build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".skip_proj.weight", ".router.weight", ".module.gamma")):
                parameter.mul_(20)  # routers that say something: some tokens are active and some are not,
            elif key.endswith((".mx_proj.weight", ".h_proj.weight")):
                parameter.mul_(10)  # and modules that make a difference
        if any("running" in key for key, _ in model.named_buffers()):
            for step in range(20):
                call(model, inputs_of(model, seed=100 + step))
    return model.eval()


def inputs_of(model: Model, batch: int = 3, length: int = 24, seed: int = 1) -> Tensor:
    """Random tokens or values for a model."""
    generator = torch.Generator().manual_seed(seed)
    if getattr(model, "vocab_size", None) is None:
        return torch.randn(batch, length, generator=generator)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def call(model: Model, inputs: Tensor, valid: Tensor | None = None, **options: Any) -> ModelOutput:
    """Run any model; a retrieval model gets the first sequence flipped as the second."""
    if isinstance(model, Retrieval):
        flipped = None if valid is None else valid.flip(1)
        out: ModelOutput = model(inputs, inputs.flip(1), valid=(valid, flipped), **options)
        return out
    assert isinstance(model, LanguageModel | Classifier)
    out = model(inputs, valid=valid, **options)
    return out


def loss_of(out: ModelOutput) -> Tensor:
    """A loss that every logit has its own part in, with the auxiliary losses."""
    weight = torch.linspace(-1, 1, out.logits.numel(), dtype=out.logits.dtype).view_as(out.logits)
    return (out.logits * weight).sum() + sum(out.losses.values(), start=out.logits.new_zeros(()))

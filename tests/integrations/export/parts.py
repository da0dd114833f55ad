"""Models to export: one for every registered part, as its suite in tests/laws configures it, and some special ones.

A part whose suite says ``exports = False`` has to be refused with the reason instead.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

import sma
import tests.laws
from sma.configurable import BaseConfig
from sma.plugins import registry
from sma.testing import ConfiguratorSuite, MixerSuite, ModuleSuite
from tests.models.tiny import VOCABULARY

GAU = {"type": "gau", "d_qk": 4, "d_v": 12, "window": 3}
TABLES: dict[str, Any] = {"activation": "laplace", "positions": "simple", "max_positions": 6}
SUITES: dict[str, type] = {"module": ModuleSuite, "mixer": MixerSuite, "configurator": ConfiguratorSuite}


def activated(configurator: Any = "sigmoid", module: Any = "ffn") -> dict[str, Any]:
    return {"activate": {"module": module, "configurator": configurator}}


def suites(kind: str) -> Iterator[Any]:
    """The suites of a kind, in the order of the files of tests/laws."""
    for module in pkgutil.iter_modules(tests.laws.__path__):
        importlib.import_module(f"tests.laws.{module.name}")
    queue: list[Any] = [SUITES[kind]]
    while queue:
        suite = queue.pop(0)
        queue += suite.__subclasses__()
        if suite.__module__.startswith("tests.laws.") and suite.__name__.startswith("Test"):
            yield suite


def exportable(kind: str) -> Iterator[Any]:
    """The suites whose part, a registered one, can be exported."""
    targets = {entry.target for entry in registry().entries() if entry.kind == kind}
    for suite in suites(kind):
        if hasattr(suite, "config") and getattr(suite, "exports", True) and type(suite.config).owner in targets:
            yield suite


def sublayer(kind: str, suite: Any) -> dict[str, Any]:
    """The part of a suite as a sublayer of a hybrid block."""
    config = sma.dump_spec(suite.config)
    if kind == "mixer":
        return {"mixer": config}
    if kind == "module":
        # What needs the whole sequence at once is always on.
        return activated(module=config) if suite.streams or suite.causal else {"module": config}
    if suite.n_modules == 1:
        return activated(config, "ffn" if suite.causal else GAU)
    modules = ["ffn"] * (suite.n_modules - 1) + ["ffn" if suite.causal else GAU]
    return {"mixture": {"modules": modules, "configurator": config}}


def registered(streams: bool) -> dict[str, dict[str, Any]]:
    """A sublayer for each registered module, mixer and configurator that does, or does not, stream.

    The suite is the first causal one, as a language model is causal.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in SUITES:
        known = sorted(exportable(kind), key=lambda suite: not suite.causal)
        for suite in known:
            name = registry().name_of(type(suite.config).owner)
            assert name is not None
            if suite.streams == streams and not (suite.causal and not streams):
                found.setdefault(name, sublayer(kind, suite))
    return found


SUBLAYERS: dict[str, dict[str, Any]] = {
    **registered(streams=True),
    "gau of local positions": activated(module=GAU | {"positions": "local", "activation": "relu2"}),
    "gau in chunks": activated(module=GAU | {"window": None, "chunk": 4} | TABLES),
    "experts of several sizes": activated(
        module={"type": "moe", "n_experts": 4, "top_k": 2, "d_hidden": 6, "d_shared": 6}
    ),
    "ema, truncated": {"mixer": {"type": "ema", "n_state": 3, "truncation": 7}},
    "sigmoid of one": activated("sigmoid"),
    "top_k of modules of two kinds": {
        "mixture": {"modules": ["ffn", "ffn", GAU], "configurator": {"type": "top_k", "k": 2, "over": "modules"}}
    },
}
"""Parts that stream."""
WHOLE: dict[str, dict[str, Any]] = {
    **registered(streams=False),
    "top_k of the sequence": activated({"type": "top_k", "over": "sequence", "rate": 0.4}, GAU),
    "attention without bounds": {"module": {"type": "attention", "n_heads": 2}},
}
"""Parts that see the whole sequence, or look in both directions."""
NORMS = registry().names("norm")
BLOCKS = ["seqboat_lm", "mega_lm"]
"""Shipped models of one block that stream."""
SHIPPED = ["seqboat_image", "seqboat_retrieval", "mega_chunk_text"]
"""Those that see the whole sequence."""


def model_of(sublayers: list[dict[str, Any]], **head: Any) -> Any:
    """A model of one block; a classifier if the head has classes."""
    torch.manual_seed(0)
    kind = "classifier" if "n_classes" in head else "language_model"
    blocks = [{"type": "hybrid", "sublayers": [{"norm": "layernorm", **each} for each in sublayers]}]
    spec = {"type": kind, "vocab_size": VOCABULARY, "d_model": 8, "n_layers": 1, "blocks": blocks, **head}
    model = sma.build(spec)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "router" in key:
                parameter.normal_()
    return model.eval()


def refused() -> set[type]:
    """The parts whose suites say that they cannot be exported."""
    found: set[type] = set()
    for kind in SUITES:
        for suite in suites(kind):
            if not getattr(suite, "exports", True):
                found |= {type(suite.config).owner} if hasattr(suite, "config") else set(suite.covers)
    return found


def owners(config: Any) -> Iterator[type]:
    """The classes of all parts in a configuration."""
    if isinstance(config, tuple):
        for each in config:
            yield from owners(each)
    elif is_dataclass(config) and isinstance(config, BaseConfig):
        if hasattr(config, "owner"):
            yield config.owner
        for field in fields(config):
            yield from owners(getattr(config, field.name))

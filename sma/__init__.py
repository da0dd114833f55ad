"""Sparse Modular Activation: any sub-module of a network runs only on the tokens that need it (arXiv 2306.11197)."""

from sma import configurators, ops, plugins, spec
from sma.configurable import BaseConfig, Configurable
from sma.errors import SMAError
from sma.interfaces import (
    Block,
    BlockOutput,
    Configurator,
    Mixer,
    Model,
    Module,
    ModuleOutput,
    Norm,
)
from sma.plugins import hookimpl, register
from sma.routing import Packed, Routing
from sma.spec import build
from sma.spec import dump as dump_spec
from sma.spec import load as load_spec
from sma.state import State, StateHistory

__all__ = [
    "BaseConfig",
    "Block",
    "BlockOutput",
    "Configurable",
    "Configurator",
    "Mixer",
    "Model",
    "Module",
    "ModuleOutput",
    "Norm",
    "Packed",
    "Routing",
    "SMAError",
    "State",
    "StateHistory",
    "build",
    "configurators",
    "dump_spec",
    "hookimpl",
    "load_spec",
    "ops",
    "plugins",
    "register",
    "spec",
]
__version__ = "0.1.0"

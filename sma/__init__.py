"""Sparse Modular Activation: any sub-module of a network runs only on the tokens that need it (arXiv 2306.11197)."""

from sma import configurators, ops
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
from sma.routing import Packed, Routing
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
]
__version__ = "0.1.0"

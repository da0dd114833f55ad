"""Sparse Modular Activation: any sub-module of a network runs only on the tokens that need it (arXiv 2306.11197)."""

from sma import configurators, ops, plugins, spec, statistics
from sma.activated import Activated
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
from sma.layer import ActivatedConfig, MixtureConfig, SparselyActivated, SparseMixture
from sma.plugins import hookimpl, register
from sma.routing import Packed, Routing
from sma.runtime.checkpointing import checkpoint
from sma.spec import build
from sma.spec import dump as dump_spec
from sma.spec import load as load_spec
from sma.state import State, StateHistory
from sma.state_files import load_state, save_state
from sma.weights import load, load_into, save
from sma.working_memory import WorkingMemory

__all__ = [
    "Activated",
    "ActivatedConfig",
    "BaseConfig",
    "Block",
    "BlockOutput",
    "Configurable",
    "Configurator",
    "Mixer",
    "MixtureConfig",
    "Model",
    "Module",
    "ModuleOutput",
    "Norm",
    "Packed",
    "Routing",
    "SMAError",
    "SparseMixture",
    "SparselyActivated",
    "State",
    "StateHistory",
    "WorkingMemory",
    "build",
    "checkpoint",
    "configurators",
    "dump_spec",
    "hookimpl",
    "load",
    "load_into",
    "load_spec",
    "load_state",
    "ops",
    "plugins",
    "register",
    "save",
    "save_state",
    "spec",
    "statistics",
]
__version__ = "0.2.0"

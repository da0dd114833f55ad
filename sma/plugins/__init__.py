"""Plugins: how names come to stand for classes. See :mod:`sma.plugins.hookspecs` for what a plugin writes.

The only package that imports pluggy.
"""

from sma.plugins.hookspecs import ENTRY_POINT_GROUP, Register, hookimpl
from sma.plugins.manager import isolated_registry, load_plugins, register, registry
from sma.plugins.registrations import Entry, Failure, Provider, Registry

__all__ = [
    "ENTRY_POINT_GROUP",
    "Entry",
    "Failure",
    "Provider",
    "Register",
    "Registry",
    "hookimpl",
    "isolated_registry",
    "load_plugins",
    "register",
    "registry",
]

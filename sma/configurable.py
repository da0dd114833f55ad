"""Classes that are built from a typed, frozen configuration of their own.

Every plugin class nests a frozen dataclass ``Config``; the tree of configurations, the tree of modules and the keys of
the state dict are one tree. ``Config.build`` finds its class by itself::

    gau = GAU.Config(d_qk=64, window=128).build(d_model=128, causal=True)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sma.errors import ConfigError


@dataclass(kw_only=True, frozen=True)
class BaseConfig:
    """Root of all configurations. Subclasses check their own ranges in ``__post_init__`` with :meth:`require`."""

    owner: ClassVar[type[Any]]

    def build(self, **context: Any) -> Any:
        """Construct the class that this configuration belongs to.

        Args:
            **context: what the surroundings decide, not the configuration (``d_model``, ``causal``, ...).

        Returns:
            An instance of :attr:`owner`.

        Raises:
            ConfigError: the configuration is abstract, or the context does not fit it.
        """
        owner = getattr(type(self), "owner", None)
        if owner is None:
            raise ConfigError(f"{type(self).__qualname__}: an abstract configuration builds nothing")
        return owner(self, **context)

    def require(self, condition: bool, field: str, rule: str) -> None:
        """Raise a :class:`ConfigError` that names ``field``, ``rule`` and the value unless ``condition`` holds."""
        if not condition:
            raise ConfigError(f"{field}: {rule}, got {getattr(self, field)!r}")


class Configurable:
    """Base of the classes that own a nested ``Config``.

    A subclass without a ``Config`` of its own gets an empty one derived from its parent's, so that
    ``type(config).owner`` is always exactly the class that the configuration builds.
    """

    Config: ClassVar[type[BaseConfig]] = BaseConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" not in cls.__dict__:
            parent = cls.Config
            empty = type(
                "Config", (parent,), {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            )
            cls.Config = dataclass(kw_only=True, frozen=True)(empty)
        if not issubclass(cls.Config, BaseConfig):
            raise ConfigError(f"{cls.__qualname__}.Config: must derive from sma.BaseConfig or a parent's Config")
        owner = cls.Config.__dict__.get("owner")
        if owner is not None:
            raise ConfigError(
                f"{cls.__qualname__}.Config: belongs to {owner.__qualname__}; derive one of its own from it"
            )
        cls.Config.owner = cls

"""Small plugin classes that the tests of specs and plugins compose."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal

from sma.configurable import BaseConfig
from sma.interfaces import Configurator, Mixer, Model, Module, Norm
from sma.plugins import Registry


class Colour(Enum):
    """For fields that are enumerations."""

    RED = "red"
    BLUE = "blue"


class LayerNorm(Norm):
    """A norm."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Norm.Config):
        eps: float = 1e-5


class ScaleNorm(Norm):
    """Another norm, with an empty Config of its own."""


class Gate(Configurator):
    """A configurator."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        rate: float = 0.5

        def __post_init__(self) -> None:
            self.require(0 <= self.rate <= 1, "rate", "must lie in [0, 1]")


class Gau(Module):
    """A module."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Module.Config):
        d_qk: int = 64
        window: int = 128
        activation: Literal["softmax", "relu2"] = "softmax"
        norm: Norm.Config | None = None


class WideGau(Gau):
    """A module derived from another."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Gau.Config):
        width: int = 2


class Ffn(Module):
    """A module without defaults."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Module.Config):
        d_hidden: int
        bias: bool


class Ema(Mixer):
    """A mixer."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Mixer.Config):
        n_state: int = 16
        scale: float | None = None


@dataclass(kw_only=True, frozen=True)
class Activate(BaseConfig):
    """Belongs to no plugin: has no ``type``."""

    module: Module.Config
    configurator: Configurator.Config = field(default_factory=lambda: Gate.Config(rate=0.25))
    only_gau: Gau.Config = field(default_factory=lambda: Gau.Config(window=3))


@dataclass(kw_only=True, frozen=True)
class Layer(BaseConfig):
    """One layer of :class:`Net`."""

    mixer: Mixer.Config | None = None
    activate: Activate | None = None
    either: Mixer.Config | Module.Config | None = None
    norm: Norm.Config = field(default_factory=lambda: LayerNorm.Config(eps=0.5))


class Net(Model):
    """A model with a field of every type that specs know."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Model.Config):
        d_model: int = 8
        lr: float = 0.1
        limit: float = field(default=1.0, metadata={"allow_nonfinite": True})
        name: str = "net"
        flag: bool = False
        pool: Literal["mean", "first", 3] = "mean"
        colour: Colour = Colour.RED
        size: int | float | None = None
        steps: tuple[int, ...] = ()
        pair: tuple[int, str] = (1, "a")
        several: list[float] = field(default_factory=list)
        table: dict[str, float] = field(default_factory=dict)
        anything: Any = None
        noted: Annotated[int, "a note"] = 0
        layers: tuple[Layer, ...] = ()


class Wrapper(Model):
    """A model that holds another."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Model.Config):
        inner: Model.Config | None = None


class Strict(Model):
    """A model whose fields are all required."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Model.Config):
        first: int
        second: str
        third: Norm.Config


CLASSES = {
    "layernorm": LayerNorm,
    "scalenorm": ScaleNorm,
    "gate": Gate,
    "gau": Gau,
    "wide_gau": WideGau,
    "ffn": Ffn,
    "ema": Ema,
    "net": Net,
    "strict": Strict,
    "wrapper": Wrapper,
}


def filled() -> Registry:
    """A registry with exactly the classes of this file."""
    registry = Registry()
    for name, cls in CLASSES.items():
        registry.register(name, cls)
    return registry

"""Classes with a typed, frozen configuration of their own."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest

from sma.configurable import BaseConfig, Configurable
from sma.errors import ConfigError, SMAError
from sma.interfaces import KINDS, Configurator, Module, Norm, Plugin, kind_of
from tests.core import spec_parts as parts


def test_config_builds_its_own_class() -> None:
    built = parts.WideGau.Config(width=5).build(d_model=4, causal=True)
    assert type(built) is parts.WideGau
    assert built.config.width == 5
    assert (built.d_model, built.causal) == (4, True)


def test_subclass_without_config_gets_its_own() -> None:
    assert parts.ScaleNorm.Config is not Norm.Config
    assert issubclass(parts.ScaleNorm.Config, Norm.Config)
    assert type(parts.ScaleNorm.Config().build(d_model=2)) is parts.ScaleNorm
    assert parts.ScaleNorm.Config.__qualname__ == "ScaleNorm.Config"
    assert Norm.Config.owner is Norm


def test_abstract_config_builds_nothing() -> None:
    with pytest.raises(ConfigError, match="an abstract configuration builds nothing"):
        BaseConfig().build()


def test_config_is_frozen_and_compared_by_value() -> None:
    config = parts.Gau.Config(window=3)
    with pytest.raises(FrozenInstanceError):
        config.window = 4  # type: ignore[misc]
    assert config == parts.Gau.Config(window=3) != parts.Gau.Config(window=4)
    assert hash(config) == hash(parts.Gau.Config(window=3))


def test_require_names_field_rule_and_value() -> None:
    with pytest.raises(ConfigError, match=r"^rate: must lie in \[0, 1\], got 1.5$"):
        parts.Gate.Config(rate=1.5)


def test_config_must_derive_from_base_config() -> None:
    with pytest.raises(ConfigError, match=r"Wrong.Config: must derive from sma.BaseConfig"):

        class Wrong(Configurable):
            @dataclass
            class Config:
                size: int = 1


def test_errors_are_value_errors_of_the_library() -> None:
    assert issubclass(ConfigError, SMAError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(("cls", "kind"), [(parts.Gau, "module"), (parts.Gate, "configurator"), (parts.Net, "model")])
def test_kind_follows_from_the_base(cls: type[Plugin], kind: str) -> None:
    assert kind_of(cls) == kind
    assert issubclass(cls, KINDS[kind])


@pytest.mark.parametrize("wrong", [int, 3, Plugin, Configurable])
def test_kind_of_something_else(wrong: object) -> None:
    with pytest.raises(ConfigError, match="a plugin class derives from one of block, configurator, "):
        kind_of(wrong)  # type: ignore[arg-type]


def test_kinds_are_the_documented_ones() -> None:
    assert set(KINDS) >= {"block", "configurator", "mixer", "model", "module", "norm"}
    assert KINDS["module"] is Module
    assert KINDS["configurator"] is Configurator

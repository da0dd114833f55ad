"""Classes and their nested configurations belong to each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sma.configurable import BaseConfig, Configurable
from sma.errors import ConfigError


class Wheel(Configurable):
    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        spokes: int = 8

        def __post_init__(self) -> None:
            self.require(self.spokes > 2, "spokes", "must be more than 2")

    def __init__(self, config: Config, *, size: int = 0) -> None:
        self.config = config
        self.size = size


class Spare(Wheel):
    """Has no options of its own."""


def test_a_configuration_builds_its_own_class() -> None:
    wheel = Wheel.Config(spokes=5).build(size=3)
    assert (type(wheel), wheel.config.spokes, wheel.size) == (Wheel, 5, 3)
    spare = Spare.Config(spokes=4).build()
    assert (type(spare), spare.config.spokes) == (Spare, 4)
    assert type(Wheel.Config().build()) is Wheel, "a derived class does not take its parent's configuration away"


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="spokes: must be more than 2, got 1"):
        Spare.Config(spokes=1)
    with pytest.raises(ConfigError, match="an abstract configuration builds nothing"):
        BaseConfig().build()
    with pytest.raises(ConfigError, match=r"Thief.Config: belongs to Wheel; derive one of its own"):
        type("Thief", (Wheel,), {"Config": Wheel.Config})
    with pytest.raises(ConfigError, match=r"must derive from sma.BaseConfig"):
        type("Loner", (Configurable,), {"Config": int})

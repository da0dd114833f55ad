"""What this package brings. The entry point in ``pyproject.toml`` names this module."""

from importlib.resources import files

import sma
from sma.plugins import Register


@sma.hookimpl
def sma_register(register: Register) -> None:
    """Register everything. The kind of a class follows from its base."""
    from sma_example_plugin import ShortConv, SinkSigmoid  # here, so that finding the plugin stays cheap

    register("short_conv", ShortConv)
    register("sink_sigmoid", SinkSigmoid)
    register("short_conv_lm", files("sma_example_plugin") / "specs" / "short_conv_lm.yaml")

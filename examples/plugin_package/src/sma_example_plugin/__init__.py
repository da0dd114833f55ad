"""An example plugin of sparse-modular-activation: a module, a configurator and a spec."""

from sma_example_plugin.configurator import SinkSigmoid
from sma_example_plugin.module import ShortConv

__all__ = ["ShortConv", "SinkSigmoid"]

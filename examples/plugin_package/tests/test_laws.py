"""The laws of the library, on the classes of this package."""

from sma_example_plugin import ShortConv, SinkSigmoid

from sma.testing import ConfiguratorSuite, ModuleSuite


class TestShortConv(ModuleSuite):
    """In a bidirectional layer; it looks back only, so it streams there too."""

    config = ShortConv.Config(kernel=3)


class TestShortConvCausal(ModuleSuite):
    """In a causal layer, chunk by chunk."""

    config = ShortConv.Config(kernel=3)
    causal = True
    streams = True


class TestSinkSigmoid(ConfiguratorSuite):
    """The configurator, deciding on two modules."""

    config = SinkSigmoid.Config(n_sinks=2)
    balances = False  # no balance can switch the sinks off


class TestNoSinks(ConfiguratorSuite):
    """A plain sigmoid."""

    config = SinkSigmoid.Config(n_sinks=0)

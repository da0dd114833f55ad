"""The laws of the library as tests, for authors of plugins and for the library itself.

A suite is a class of pytest tests. Derive from that of your kind, say what to build, and pytest runs every law::

    from sma.testing import ModuleSuite
    from my_package import Gate

    class TestGate(ModuleSuite):
        config = Gate.Config(width=4)

    class TestGateCausal(ModuleSuite):
        config = Gate.Config(width=4)
        causal = True
        streams = True

============================  ==================================================================================
suite                         what it tests
============================  ==================================================================================
:class:`ModuleSuite`          an activatable module, inside :class:`sma.layer.SparselyActivated`
:class:`StockSuite`           the same for any ``nn.Module`` that knows nothing of this library
:class:`ConfiguratorSuite`    a configurator, alone and inside :class:`sma.layer.SparseMixture`
:class:`MixerSuite`           an always-on sequence layer
:class:`NormSuite`            a normalisation
:class:`BlockSuite`           a block of depth
:class:`ModelSuite`           a whole model
:class:`OpSuite`              an operation with several backends
============================  ==================================================================================

Class attributes say what varies (``d_model``, ``causal``, ``streams``, ``tolerance``, ...); methods can be overridden
where a plugin needs its own way of building or of drawing inputs. A law that cannot apply (streaming of a module that
looks ahead) is left out, and its opposite tested: that streaming is refused. A test that is wrong for a plugin for good
reason is set to None in the suite. Needs pytest and hypothesis, which nothing else in the library imports.
"""

from sma.testing.base import Result, SequenceSuite, law
from sma.testing.configurator import ConfiguratorSuite
from sma.testing.op import OpCase, OpSuite
from sma.testing.suites import BlockSuite, MixerSuite, ModelSuite, ModuleSuite, NormSuite, StockSuite

__all__ = [
    "BlockSuite",
    "ConfiguratorSuite",
    "MixerSuite",
    "ModelSuite",
    "ModuleSuite",
    "NormSuite",
    "OpCase",
    "OpSuite",
    "Result",
    "SequenceSuite",
    "StockSuite",
    "law",
]

"""Every registered configurator obeys the laws, alone and in a mixture of one to three modules."""

from __future__ import annotations

import torch

from sma.configurators import (
    Always,
    ExpertChoice,
    FixedRate,
    GumbelSoftmax,
    Replay,
    Sigmoid,
    TemperedSoftmax,
    TopK,
)
from sma.interfaces import Configurator
from sma.routing import Routing
from sma.testing import ConfiguratorSuite
from tests.laws.table import covers


class TestTemperedSoftmax(ConfiguratorSuite):
    config = TemperedSoftmax.Config()
    n_modules = 1


class TestTemperedSoftmaxOverThree(ConfiguratorSuite):
    config = TemperedSoftmax.Config(init_temp=1.0)
    n_modules = 3


class TestSigmoid(ConfiguratorSuite):
    config = Sigmoid.Config(threshold=0.4, temperature=2.0)


class TestGumbelSoftmax(ConfiguratorSuite):
    config = GumbelSoftmax.Config(temperature=0.5)


class TestGumbelSoftmaxHard(ConfiguratorSuite):
    config = GumbelSoftmax.Config(hard=True)
    test_gradcheck = None  # straight-through: its gradient is not that of its value, on purpose


class TestTopKOfModules(ConfiguratorSuite):
    config = TopK.Config(k=2)
    n_modules = 3
    balances = False  # as many modules whatever the balance


class TestTopKOfModulesNotRenormalised(ConfiguratorSuite):
    config = TopK.Config(k=1, renormalise=False)
    n_modules = 3
    balances = False


class TestTopKOfTheSequence(ConfiguratorSuite):
    config = TopK.Config(over="sequence", rate=0.4)
    n_modules = 1
    causal = False
    balances = False  # as many tokens whatever the balance


class TestExpertChoice(ConfiguratorSuite):
    config = ExpertChoice.Config(rate=0.5)
    n_modules = 2
    causal = False
    balances = False


class TestExpertChoiceOfOne(ConfiguratorSuite):
    config = ExpertChoice.Config(rate=0.3)
    n_modules = 1
    causal = False
    balances = False


class TestAlways(ConfiguratorSuite):
    config = Always.Config()
    balances = False


class TestFixedRate(ConfiguratorSuite):
    config = FixedRate.Config(rate=0.3)
    balances = False


class TestReplay(ConfiguratorSuite):
    """Recorded for a batch, so the laws on other batches do not apply; those on chunks and gradients do."""

    balances = False
    covers = (Replay,)
    exports = False  # what it decides is values, not a computation

    def create(self) -> Configurator:
        torch.manual_seed(11)
        active = torch.rand(2, 80, self.n_modules) < 0.5
        valid = torch.ones(2, 80, dtype=torch.bool)
        confidence = torch.rand(2, 80, self.n_modules, dtype=torch.float64)
        return Replay.of(Routing(active, confidence, valid, torch.arange(80).expand(2, 80)))

    test_a_row_is_what_it_is_alone = None
    test_order_of_the_batch = None
    test_content_of_the_padding = None
    test_gradient_of_the_padding = None
    test_gradient_of_batch_mates = None
    test_any_chunks = None
    test_a_long_stream_of_steps = None
    test_reorder = None
    test_state_has_the_batch_first = None
    test_nothing_active = None
    test_replay_repeats = None
    test_checkpointing = None
    test_backends_agree = None
    test_same_bits_twice = None
    test_ties = None
    test_bad_input = None


test_every_configurator_is_here = covers("configurator", globals())

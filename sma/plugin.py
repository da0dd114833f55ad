"""The configurators that ship with sma, registered by the same hook as those of any other package."""

from collections.abc import Callable
from typing import Any

from sma.plugins import hookimpl


@hookimpl
def sma_register(register: Callable[[str, Any], None]) -> None:
    """Register every configurator."""
    from sma import configurators

    register("tempered_softmax", configurators.TemperedSoftmax)
    register("sigmoid", configurators.Sigmoid)
    register("gumbel_softmax", configurators.GumbelSoftmax)
    register("top_k", configurators.TopK)
    register("expert_choice", configurators.ExpertChoice)
    register("always", configurators.Always)
    register("fixed_rate", configurators.FixedRate)
    register("replay", configurators.Replay)

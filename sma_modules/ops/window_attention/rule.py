"""What the backends of window attention share: the rule of visibility, and where every sequence lies."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["softmax", "relu2", "laplace"]
Bias = Literal["none", "original", "local"]

LAPLACE_MEAN = 0.707107
LAPLACE_DEVIATION = 0.282095


class Rule(NamedTuple):
    """Which keys a query sees and how scores become weights. All of it is known on the host.

    Attributes:
        causal: no key after the query.
        window: how many keys to each side (causal: to the left) are visible besides the own one; None is no bound.
        chunk: only keys whose index has the same quotient by ``chunk``.
        activation: from scores to weights.
        bias: what the table of biases is indexed by.
        dropout: share of the weights that is dropped.
    """

    causal: bool
    window: int | None
    chunk: int | None
    activation: Activation
    bias: Bias
    dropout: float

    @property
    def reach(self) -> int | None:
        """The largest distance at which a key can be visible, or None."""
        bounds = [bound for bound in (self.window, None if self.chunk is None else self.chunk - 1) if bound is not None]
        return min(bounds) if bounds else None

    @property
    def divisor(self) -> int | None:
        """What relu2 and laplace divide the products by; None for the number of visible keys of each query."""
        return None if self.window is None else self.window if self.causal else 2 * self.window


class Layout(NamedTuple):
    """Where the sequences lie in the packed rows, see :func:`sma_modules.ops.window_attention.window_attention`."""

    q_cu: Tensor
    k_cu: Tensor
    k_start: Tensor | None
    q_position: Tensor | None
    k_position: Tensor | None
    max_q: int
    max_k: int

    @property
    def aligned(self) -> bool:
        """Every sequence has as many keys as queries, known without looking at the values."""
        return self.q_cu is self.k_cu

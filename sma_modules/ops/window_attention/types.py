"""What :func:`~sma_modules.ops.window_attention.window_attention` attends with: tensors, layout and rule."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["softmax", "relu2", "laplace"]
Bias = Literal["none", "original", "local"]

LAPLACE_MEAN = 0.707107
LAPLACE_DEVIATION = 0.282095


class Inputs(NamedTuple):
    """The tensors that have a gradient.

    Attributes:
        q: ``(Q, H, z)`` queries.
        k: ``(K, G, z)`` keys.
        v: ``(K, G, h)`` values.
        gate: ``(Q, H, h)`` factor of the result, or None.
        table: ``(2P - 1,)`` biases, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    table: Tensor | None


class Rule(NamedTuple):
    """Which keys a query sees and how scores become weights. The host knows all of it.

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
        if self.chunk is None:
            return self.window
        return self.chunk - 1 if self.window is None else min(self.window, self.chunk - 1)

    @property
    def divisor(self) -> int | None:
        """Divisor of the products for relu2 and laplace; None for the number of visible keys of each query."""
        return None if self.window is None else self.window if self.causal else 2 * self.window


class Layout(NamedTuple):
    """Where the sequences lie in the packed rows, see :func:`~sma_modules.ops.window_attention.window_attention`.

    Attributes:
        q_cu: ``(B + 1,)`` bounds of the queries of each sequence.
        k_cu: ``(B + 1,)`` bounds of the keys.
        k_start: ``(B,)`` keys of the stream before the first one here, or None.
        q_position: ``(Q,)`` original positions, or None.
        k_position: ``(K,)`` original positions, or None.
        max_q: upper bound of the queries of a sequence.
        max_k: upper bound of the keys of a sequence.
        aligned: ``k_cu`` is ``q_cu``, so every sequence has as many keys as queries; known without reading values.
    """

    q_cu: Tensor
    k_cu: Tensor
    k_start: Tensor | None
    q_position: Tensor | None
    k_position: Tensor | None
    max_q: int
    max_k: int
    aligned: bool


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    key_width: int
    empty: bool
    few_queries: bool

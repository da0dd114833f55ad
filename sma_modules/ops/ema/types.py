"""What :func:`~sma_modules.ops.ema.ema` computes with: parameters, options and stream."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sma_modules.ops.ema.state import EMAState

Activation = Literal["none", "silu"]
STEP_LENGTH = 16
"""Up to this many tokens the recurrence is faster than setting up anything else."""


class EMAParameters(NamedTuple):
    """The parameters of an average, ``rows`` being D, or 2 D when it is bidirectional.

    Attributes:
        delta: ``(rows, N)`` logit of the damping p.
        alpha: ``(rows, N)`` logit of the decay.
        beta: ``(rows, N)`` input weights.
        gamma: ``(rows, N)`` output weights.
        omega: ``(D,)`` weight of the direct path.
    """

    delta: Tensor
    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    omega: Tensor


class EMAOptions(NamedTuple):
    """What is computed, see :func:`~sma_modules.ops.ema.ema`."""

    bidirectional: bool
    truncation: int | None
    activation: Activation
    dropout: float


class EMAStream(NamedTuple):
    """Where the tokens stand in their sequences.

    Attributes:
        lengths: ``(B,)`` real tokens of each row; None when all are.
        state: what came before; None at the beginning.
        keep: return the state after the last real token.
    """

    lengths: Tensor | None
    state: EMAState | None
    keep: bool


class Signature(NamedTuple):
    """What the choice of a backend depends on.

    Attributes:
        device: of the tokens.
        dtype: of the tokens.
        parameters: their dtypes.
        n_state: N.
        large: sequences of 2^31 numbers or more.
        few: at most :data:`STEP_LENGTH` tokens of a truncated stream.
        carried_gradient: a gradient is wanted through a state that is carried.
    """

    device: torch.device
    dtype: torch.dtype
    parameters: tuple[torch.dtype, ...]
    n_state: int
    large: bool
    few: bool
    carried_gradient: bool

"""ema: the multi-dimensional damped exponential moving average of MEGA (arXiv 2209.10655, section 3.1)."""

from sma_modules.ops.ema.op import OP, ema
from sma_modules.ops.ema.state import EMAState, compute_dtype, initial_state
from sma_modules.ops.ema.types import Activation

__all__ = ["OP", "Activation", "EMAState", "compute_dtype", "ema", "initial_state"]

"""ema_step: one step of the damped moving average, in place, the recurrence for one token of every sequence."""

from sma_modules.ops.ema_step.memory import Averages, Coefficients
from sma_modules.ops.ema_step.op import OP, ema_step

__all__ = ["OP", "Averages", "Coefficients", "ema_step"]

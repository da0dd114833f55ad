"""ema: the multi-dimensional damped exponential moving average of MEGA (arXiv 2209.10655, section 3.1).

Per channel d and state n, with ``p = sigmoid(delta)`` and ``q = 1 - p * sigmoid(alpha)``::

    S_t = q * S_{t-1} + p * beta * x_t
    y_t = sum_n gamma[n] / sqrt(N) * S_t[n] + omega * x_t

which is a convolution with ``k[j] = sum_n gamma / sqrt(N) * p * beta * q^j``. With ``truncation=K`` the kernel ends
after K taps. README.md derives how the convolution, the recurrence, the bounded window and the chunked scan agree.
"""

from sma_modules.ops.ema.op import OP, ema
from sma_modules.ops.ema.state import EMAState, compute_dtype, initial_state
from sma_modules.ops.ema.types import Activation

__all__ = ["OP", "Activation", "EMAState", "compute_dtype", "ema", "initial_state"]

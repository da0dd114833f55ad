"""feed_forward: the feed-forward network on packed tokens, and its activation alone for grouped products of experts.

The products stay PyTorch's; what lies between them is one kernel forward and one backward, and only the results of the
first products are kept for the backward pass (README.md).
"""

from sma_modules.ops.feed_forward.op import ACTIVATE, FEED_FORWARD, activate, feed_forward
from sma_modules.ops.feed_forward.types import Activation, Projection

__all__ = ["ACTIVATE", "FEED_FORWARD", "Activation", "Projection", "activate", "feed_forward"]

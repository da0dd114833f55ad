"""extract as one indexed copy into zeros.

The rows are distinct, so there is nothing to add up and the bits are the same each time.
"""

from torch import Tensor

from sma.ops.packed import Packed


def extract(h: Tensor, packed: Packed) -> Tensor:
    """One ``index_copy`` over the flattened batch."""
    batch, length = packed.shape
    if packed.whole:
        return h.reshape(batch, length, *h.shape[1:])
    if packed.overflow is None:
        flat = h.new_zeros(batch * length, *h.shape[1:]).index_copy(0, packed.index, h)
    else:  # rows without a token go into one more row at the end, which is cut off
        flat = h.new_zeros(batch * length + 1, *h.shape[1:]).index_copy(0, packed.index, h)[:-1]
    return flat.reshape(batch, length, *h.shape[1:])

"""compress as one gather. Its backward adds into zeros at distinct rows, so it is deterministic."""

from torch import Tensor

from sma.ops.compress import OP
from sma.routing import Packed


@OP.backend("eager")
def compress(x: Tensor, packed: Packed) -> Tensor:
    """One ``index_select`` over the flattened batch."""
    flat = x.flatten(0, 1)
    if not packed.fixed:
        return flat.index_select(0, packed.index)
    if not flat.shape[0]:
        return flat.new_zeros(packed.index.numel(), *flat.shape[1:]) + flat.sum()
    rows = flat.index_select(0, packed.index.clamp(max=flat.shape[0] - 1))
    empty = packed.index == flat.shape[0]
    return rows.masked_fill(empty.view(-1, *(1,) * (x.dim() - 2)), 0)

"""What a model activates, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sma.ops import using
from sma.ops.segment_sum import segment_sum
from sma.routing import Packed, Routing


def activation_rate(routings: Mapping[str, Routing]) -> dict[str, Tensor]:
    """``(B, M)`` rate of each layer: the share of each sequence's real tokens that activate each module."""
    return {name: routing.rate() for name, routing in routings.items()}


def attention_span(packed: Packed, window: int | None, *, causal: bool) -> Tensor:
    """Mean distance in the input between an active token and the active tokens that it sees.

    Two tokens that are ``window`` apart after compression can be any distance apart in the input; this is the unbounded
    span of the paper. A token does not count itself; a token that sees no other counts as 0.

    Args:
        packed: the active tokens.
        window: how many active tokens to each side are visible; None means all.
        causal: only earlier ones.

    Returns:
        ``(B,)`` float64: mean over the active tokens of each sequence, 0 where there are none.
    """
    spans = packed.position.new_zeros(packed.position.shape, dtype=torch.float64)
    bounds = packed.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        spans[start:stop] = _mean_distance(packed.position[start:stop].double(), window, causal)
    return segment_sum(spans, packed.cu_seqlens) / packed.lengths.clamp(min=1)


def _mean_distance(position: Tensor, window: int | None, causal: bool) -> Tensor:
    """Per token, from prefix sums: the positions of a sequence ascend, so distances need no (K, K) table."""
    n = position.numel()
    reach = n if window is None else min(window, n)
    here = torch.arange(n, device=position.device)
    sums = torch.cat([position.new_zeros(1), position.cumsum(0)])
    first = (here - reach).clamp(min=0)
    total = position * (here - first) - (sums[here] - sums[first])
    count = here - first
    if not causal:
        last = (here + reach).clamp(max=n - 1)
        total = total + (sums[last + 1] - sums[here + 1]) - position * (last - here)
        count = count + last - here
    return total / count.clamp(min=1)


@dataclass(frozen=True)
class OperationCount:
    """Floating-point operations of one forward pass.

    Attributes:
        spent: with the model's own decisions.
        always_on: with every module active at every real token.
    """

    spent: int
    always_on: int

    @property
    def saved(self) -> float:
        """Share of the always-on operations that were not needed, 0 to 1."""
        return 1 - self.spent / self.always_on if self.always_on else 0.0


def _fft_flops(x_shape: Any, *args: Any, **kwargs: Any) -> int:
    # 5 N log2 N for a complex transform of length N (Cooley-Tukey), half of it for real data; the last axis is the
    # transformed one.
    elements = 1
    for size in x_shape:
        elements *= size
    return int(2.5 * elements * max(int(x_shape[-1]) - 1, 1).bit_length())


_FFT = {
    torch.ops.aten._fft_r2c: _fft_flops,
    torch.ops.aten._fft_c2r: _fft_flops,
    torch.ops.aten._fft_c2c: _fft_flops,
}


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of everything that ``run`` calls: matrix products, convolutions, attention, transforms.

    Element-wise work is not counted, as usual. The operations of this library run on their eager backend meanwhile: the
    counter cannot look into kernels.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton, where that is installed

    with torch.no_grad(), using("eager"), FlopCounterMode(display=False, custom_mapping=_FFT) as counter:
        run()
    return int(counter.get_total_flops())


def all_active(routing: Routing) -> Routing:
    """The routing of the same tokens with every module active at every real token."""
    return Routing(
        routing.valid[..., None].expand_as(routing.active), routing.confidence, routing.valid, routing.position
    )


def operations(run: Callable[[Mapping[str, Routing] | None], Any]) -> OperationCount:
    """Count a model's operations as it is and always on, on the same input.

    Args:
        run: calls the model with the given ``replay`` and returns something with ``routings``.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").eval()
        >>> tokens = torch.randint(256, (1, 50))
        >>> count = operations(lambda replay: model(tokens, replay=replay))
        >>> 0 < count.spent <= count.always_on
        True
    """
    outputs: list[Any] = []
    spent = count_flops(lambda: outputs.append(run(None)))
    replay = {name: all_active(routing) for name, routing in outputs[0].routings.items()}
    return OperationCount(spent, count_flops(lambda: run(replay)))

"""pack: every backend gives the same rows, exactly."""

from __future__ import annotations

import pytest
import torch

from sma.ops import using
from sma.ops.pack import pack
from tests.devices import DEVICE, needs_triton
from tests.ops.kernel_checks import assert_sound, mask_of

pytestmark = needs_triton
SHAPES = ((3, 50), (1, 1), (2, 129))


@pytest.mark.parametrize("shape", [*SHAPES, (4, 1030)])
@pytest.mark.parametrize("capacity", [None, 1, 7, 5000])
@pytest.mark.parametrize("positions", [None, "own", "shared"])
def test_pack(shape: tuple[int, int], capacity: int | None, positions: str | None) -> None:
    mask = mask_of(*shape)
    own = torch.arange(mask.numel(), device=DEVICE).view(shape) * 3
    position = {None: None, "own": own, "shared": own[:1].expand(shape)}[positions]
    with using("reference"):
        expected = pack(mask, position, capacity=capacity)
    for backend in ("eager", "triton"):
        with using(backend):
            actual = pack(mask, position, capacity=capacity)
        for name in expected._fields:
            have, want = getattr(actual, name), getattr(expected, name)
            assert (have is None) == (want is None), name
            assert have is None or (torch.equal(have, want) and have.dtype == want.dtype), name


def test_operators_are_sound() -> None:
    from sma.ops.pack import launch

    mask = mask_of(2, 9)
    assert_sound(
        (launch.count, (mask,)),
        (launch.place, (mask, launch.count(mask), None, 18, True)),
        (launch.place, (mask, launch.count(mask), None, 18, False)),
    )

"""The checks of annotated shapes are at work in this test run, and stay out of the way where they should."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from sma import Packed
from sma.errors import ShapeError
from sma.ops.compress import compress
from tests.shapes import _tactful

PACKED = Packed.from_mask(torch.tensor([[True, False, True]]))


def test_wrong_dtype_is_found() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        compress(torch.ones(1, 3, 2, dtype=torch.int64), PACKED)


def test_own_errors_come_first() -> None:
    with pytest.raises(ShapeError, match="compress: x must begin with"):
        compress(torch.ones(3), PACKED)


def test_compiler_is_let_through() -> None:
    def double(x: jaxtyping.Float[torch.Tensor, " n"]) -> jaxtyping.Float[torch.Tensor, " n"]:
        return 2 * x

    compiled = torch.compile(_tactful(typechecker=None)(double), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), 2 * torch.ones(3))

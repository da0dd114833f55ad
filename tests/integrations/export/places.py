"""Where models are exported in the tests: dtypes on the CPU, and on CUDA where there is one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sma.testing.precision import imprecision

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Place(NamedTuple):
    """A device, and the dtype that a model has there."""

    device: str
    dtype: torch.dtype

    def of(self, model: Any) -> Any:
        """A copy of the model there."""
        return deepcopy(model).to(self.device, self.dtype)


def at(device: str, *dtypes: torch.dtype) -> list[Any]:
    """Parameters of a test; those for CUDA are skipped without it."""
    marks = [needs_cuda] if device == "cuda" else []
    return [pytest.param(Place(device, each), marks=marks, id=f"{device} {str(each)[6:]}") for each in dtypes]


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EVERYWHERE = [*at("cpu", torch.bfloat16), *at("cuda", *FLOATS)]
"""Float32 on the CPU is what all the other tests are about."""


def check(mine: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Results are those of the library in the same dtype, ``plain``.

    In float32 within 1e-4. In 16 bits they are at most twice as far from the ``exact`` ones in float64.
    """
    (dtype,) = {each.dtype for each in (*mine, *plain)}
    one, other, truth = (torch.cat([each.flatten().cpu() for each in some]) for some in (mine, plain, exact))
    if dtype == torch.float32:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    else:
        problem = imprecision(one, other, truth, in_16_bits=True)
        assert problem is None, problem

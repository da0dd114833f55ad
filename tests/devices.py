"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def error_of(actual: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and mean absolute error."""
    error = (actual.detach().double() - exact.detach().double()).abs()
    return (float(error.max()), float(error.mean())) if error.numel() else (0.0, 0.0)

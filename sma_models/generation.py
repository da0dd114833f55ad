"""The name of :mod:`sma_models.inference.generation` in 0.1.0."""

from sma_models.inference.generation import check_sampling, generate, sample, stream

__all__ = ["check_sampling", "generate", "sample", "stream"]

"""What the choices of backends depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sma_modules.ops.feed_forward.types import ActivateSignature


class Signature(NamedTuple):
    """Of a product.

    Attributes:
        device: of the rows.
        dtype: of the rows and matrices.
        aligned: both widths of the matrices are multiples of 16 bytes of bfloat16, and not 0.
        empty: there are no rows.
        many_rows: 2^31 or more.
        large: matrices of 2^31 entries or more.
        few_products: fewer multiplications than PyTorch's product is worth.
    """

    device: torch.device
    dtype: torch.dtype
    aligned: bool
    empty: bool
    many_rows: bool
    large: bool
    few_products: bool


class ActivatedSignature(NamedTuple):
    """Of an activation and the product after it."""

    device: torch.device
    activation: ActivateSignature
    product: Signature

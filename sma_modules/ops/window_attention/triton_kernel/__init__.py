"""Window attention on a GPU, in the manner of flash attention; the README derives the less obvious parts."""

from sma_modules.ops.window_attention.triton_kernel.backward import (
    add_kernel,
    d_keys_kernel,
    d_queries_kernel,
    ungate_kernel,
)
from sma_modules.ops.window_attention.triton_kernel.forward import attend_kernel
from sma_modules.ops.window_attention.triton_kernel.tables import local_table_kernel, original_table_kernel

__all__ = [
    "add_kernel",
    "attend_kernel",
    "d_keys_kernel",
    "d_queries_kernel",
    "local_table_kernel",
    "original_table_kernel",
    "ungate_kernel",
]

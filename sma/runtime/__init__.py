"""How a computation runs on its device: CUDA graphs, checkpointing, recomputation, matrix products."""

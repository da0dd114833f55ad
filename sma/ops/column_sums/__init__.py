"""column_sums: gradients of biases, and what programs of a kernel leave to be added up. For the kernels alone."""

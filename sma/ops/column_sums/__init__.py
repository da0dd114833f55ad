"""column_sums: gradients of biases, and sums over the partial results of the programs of a kernel. Used by kernels
only.
"""

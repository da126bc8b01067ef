"""The kernels in Triton, one a file."""

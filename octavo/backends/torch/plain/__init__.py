"""The kernels in torch alone: slow and obvious, on any device."""

"""The torch backend: the graph on CUDA and ROCm devices, and on torch's CPU device for tests."""

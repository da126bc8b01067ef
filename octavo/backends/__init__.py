"""Backends: each makes a Program of a Graph. They know tensors, nothing of requests."""

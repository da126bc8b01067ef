"""Backends: each makes a Program of a Graph. They know tensors and operators, nothing of requests."""

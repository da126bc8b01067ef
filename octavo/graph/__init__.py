"""Typed operators, tracing, stored forms of weights, arrays of a step; no file, no device."""

"""The graph: typed operators, tracing, the stored forms of weights and the arrays of a step. Knows no file and no device."""

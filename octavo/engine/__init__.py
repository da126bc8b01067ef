"""The engine: the step loop, the process it lives in, the ways to talk to it. Knows no HTTP."""

"""The reference backend: every operator in numpy, slow and obvious; the oracle of all others."""

from octavo.backends.reference.program import compile

__all__ = ["compile"]

"""Model files: our own parsers, their tensors in stored forms, and where files come from.

Knows files and bytes; no graph's operators, no device, no text.
"""

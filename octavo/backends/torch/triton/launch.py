"""What every launch of a kernel says."""

from __future__ import annotations

FP_FUSION = {"enable_fp_fusion": True}
"""Whether a product and a sum become one rounding is said explicitly: the default of Triton changes
with its version 3.10."""

"""The table of kernels in torch alone."""

from __future__ import annotations

import torch

from octavo.backends.torch.kernels import Kernels
from octavo.backends.torch.plain.attention import attention
from octavo.backends.torch.plain.cache import copy_blocks, rope_write
from octavo.backends.torch.plain.linear import grouped_linear, matmul, quantized_linear
from octavo.backends.torch.plain.rows import gated, quantize, rms_norm
from octavo.backends.torch.plain.sample import sample

KERNELS = Kernels(
    rms_norm=rms_norm,
    gated=gated,
    quantize=quantize,
    rope_write=rope_write,
    attention=attention,
    matmul=matmul,
    linear=torch.nn.functional.linear,
    grouped_linear=grouped_linear,
    quantized_linear=quantized_linear,
    sample=sample,
    copy_blocks=copy_blocks,
)

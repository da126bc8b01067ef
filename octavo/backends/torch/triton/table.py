"""The table of kernels in Triton."""

from __future__ import annotations

from octavo.backends.torch.kernels import Kernels
from octavo.backends.torch.triton.attention import attention
from octavo.backends.torch.triton.copy_blocks import copy_blocks
from octavo.backends.torch.triton.gated import gated
from octavo.backends.torch.triton.grouped_linear import grouped_linear
from octavo.backends.torch.triton.matmul import matmul
from octavo.backends.torch.triton.quantize import quantize
from octavo.backends.torch.triton.quantized_linear import quantized_linear
from octavo.backends.torch.triton.rms_norm import rms_norm
from octavo.backends.torch.triton.rope_write import rope_write
from octavo.backends.torch.triton.row_linear import linear
from octavo.backends.torch.triton.sample import sample

KERNELS = Kernels(
    rms_norm=rms_norm,
    gated=gated,
    quantize=quantize,
    rope_write=rope_write,
    attention=attention,
    matmul=matmul,
    linear=linear,
    grouped_linear=grouped_linear,
    quantized_linear=quantized_linear,
    sample=sample,
    copy_blocks=copy_blocks,
)

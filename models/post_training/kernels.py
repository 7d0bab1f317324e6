"""Models the activation rounding of weight-only kernels: ONNX Runtime's MatMulNBits computes in 8 bits.

It rounds a token's inputs in blocks, each with a scale of its own, that are the groups of the weight.  Kernels on GPUs leave inputs as
they are.
"""

import torch
from torch import Tensor

from models.quantization.fake_quantize import in_blocks, in_shape_of
from models.quantization.formats import Grid

_BLOCK_OF_ROWS = 32  # what ONNX Runtime divides a weight with one scale a row into


def kernel_block(weight: Grid) -> int:
    """How many inputs of a token share a scale, by the grid of the weight: as many as in the weight."""
    return weight.group_size or _BLOCK_OF_ROWS


def rounded_in_blocks(input_XI: Tensor, block_size: int) -> Tensor:
    """Inputs (..., I) as MatMulNBits reads them: one scale for each block of a token, of which the last may be shorter."""
    blocks = in_blocks(input_XI, block_size)
    scale = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(blocks.dtype).tiny) / 127
    return in_shape_of(input_XI, (blocks / scale).round() * scale)

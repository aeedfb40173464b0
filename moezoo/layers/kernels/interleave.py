"""interleave: the columns of x in the order in which `unpack` has those of the weights.

    out[t, (chunk * WAYS + way) * 8 + i] = x[t, (chunk * 8 + i) * WAYS + way], and 0 for K and more

Legend: T rows, K columns, P the least whole number of chunks from K on, WAYS columns in a word.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.unpack import CHUNK


def padded(num_columns: int, ways: int) -> int:
    """P"""
    chunk: int = CHUNK.value * ways
    return cdiv(num_columns, chunk) * chunk


def interleave_ref(x: Tensor, ways: int) -> Tensor:
    x = F.pad(x, (0, padded(x.shape[1], ways) - x.shape[1]))
    return x.unflatten(-1, (-1, CHUNK.value, ways)).mT.flatten(-3)


@triton.jit
def _interleave_kernel(
    x_ptr,
    out_ptr,
    num_columns,
    num_chunks,
    stride_xt,
    stride_xk,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None, None]
    ways = tl.arange(0, WAYS)[None, :, None]
    inner = tl.arange(0, CHUNK)[None, None, :]
    cols = (chunks * CHUNK + inner) * WAYS + ways
    x = tl.load(x_ptr + row * stride_xt + cols * stride_xk, mask=cols < num_columns, other=0.0)
    p_out = out_ptr + row * num_chunks * WAYS * CHUNK + (chunks * WAYS + ways) * CHUNK + inner
    tl.store(p_out, x, mask=chunks < num_chunks)


def interleave(x: Tensor, ways: int) -> Tensor:
    """x [T, K] of any strides -> [T, P]."""
    num_rows, num_columns = x.shape
    width = padded(num_columns, ways)
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    num_chunks = width // (CHUNK.value * ways)
    block = min(32, next_power_of_2(num_chunks))
    _interleave_kernel[(num_rows, cdiv(num_chunks, block))](
        x,
        out,
        num_columns,
        num_chunks,
        *x.stride(),
        WAYS=ways,
        BLOCK=block,
        num_warps=4,
        **launch_options(x.device),
    )
    return out

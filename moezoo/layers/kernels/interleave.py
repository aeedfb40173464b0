"""interleave: the columns of x in the order in which `unpack` has those of the weights.

    out[t, way * W + i] = x[t, i * WAYS + way],  W = K / WAYS

Legend: T rows, K columns, W words of a row of weights, WAYS columns in a word.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


def interleave_ref(x: Tensor, ways: int) -> Tensor:
    return x.unflatten(-1, (-1, ways)).mT.flatten(-2)


@triton.jit
def _interleave_kernel(
    x_ptr,
    out_ptr,
    num_words,
    stride_xt,
    stride_xk,
    WAYS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    ways = tl.arange(0, WAYS)[None, :]
    m_words = words < num_words
    p_x = x_ptr + row * stride_xt + (words * WAYS + ways) * stride_xk
    x = tl.load(p_x, mask=m_words, other=0.0)
    p_out = out_ptr + row * num_words * WAYS + ways * num_words + words
    tl.store(p_out, x, mask=m_words)


def interleave(x: Tensor, ways: int) -> Tensor:
    """x [T, K] of any strides -> [T, K] of dense rows.

    Raises ValueError where `ways` does not divide K.
    """
    num_rows, num_columns = x.shape
    if num_columns % ways:
        raise ValueError(f"x must be [T, K] with a K that {ways} divides, got {list(x.shape)}")
    if ways == 1:
        return x.contiguous()
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    num_words = num_columns // ways
    if out.numel() == 0:
        return out
    block = min(256, next_power_of_2(num_words))
    _interleave_kernel[(num_rows, cdiv(num_words, block))](
        x,
        out,
        num_words,
        *x.stride(),
        WAYS=ways,
        BLOCK_W=block,
        num_warps=4,
        **launch_options(x.device),
    )
    return out

"""down: the second grouped product, each row written where the token's K rows lie together.

    y[order[r]] = w2[e] @ h[r] + bias,  e the expert with offsets[e] <= r < offsets[e+1]

Products accumulate in fp32, y is rounded once.

Legend: H hidden, I expert intermediate, E experts, S rows, N tile numbers (see `permute`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.permute import first_tile
from moezoo.layers.kernels.tiles import GROUP_M, choose_tile


def down_ref(
    h: Tensor,
    w2: Tensor,
    order: Tensor,
    offsets: Tensor,
    tile_experts: Tensor,
    *,
    tile_rows: int,
    bias2: Tensor | None = None,
) -> Tensor:
    y = h.new_zeros(order.numel(), w2.shape[1])
    for e in range(w2.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        y_e = h[rows].float() @ w2[e].float().T
        if bias2 is not None:
            y_e += bias2[e].float()
        y[order[rows].long()] = y_e.to(y.dtype)
    return y


@triton.jit
def _down_kernel(
    h_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    order_ptr,
    offsets_ptr,
    tile_experts_ptr,
    num_tiles,
    intermediate_size,
    hidden_size,
    stride_we,
    stride_wn,
    stride_wi,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE_PER_ROW: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n = tl.cdiv(hidden_size, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n)
    group_size = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + (pid % (GROUP_M * num_n)) % group_size
    pid_n = (pid % (GROUP_M * num_n)) // group_size
    expert = tl.load(tile_experts_ptr + tile)
    if expert < 0:
        return
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    tile_in_expert = tile - first_tile(expert, begin, BLOCK_M, TILE_PER_ROW)
    rows = begin + tile_in_expert * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_cols = cols < hidden_size

    # Rows and columns past the end read a valid row and column 0, and are not stored.
    h_rows = tl.where(m_rows, rows, begin).to(tl.int64)
    w_rows = tl.where(m_cols, cols, 0).to(tl.int64)
    expert = expert.to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    p_h = h_ptr + h_rows[:, None] * intermediate_size + inner[None, :]
    p_w = w_ptr + expert * stride_we + w_rows[None, :] * stride_wn + inner[:, None] * stride_wi

    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, intermediate_size, BLOCK_K):
        if EVEN_K:
            b_h = tl.load(p_h)
            b_w = tl.load(p_w)
        else:
            m_inner = start + inner < intermediate_size
            b_h = tl.load(p_h, mask=m_inner[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_inner[:, None], other=0.0)
        y = tl.dot(b_h, b_w, y, input_precision="ieee")
        p_h += BLOCK_K
        p_w += BLOCK_K * stride_wi

    if HAS_BIAS:
        p_bias = bias_ptr + expert * stride_be + w_rows * stride_bn
        y += tl.load(p_bias).to(tl.float32)[None, :]
    positions = tl.load(order_ptr + rows, mask=m_rows, other=0).to(tl.int64)
    o_y = positions[:, None] * hidden_size + cols[None, :]
    tl.store(y_ptr + o_y, y.to(y_ptr.dtype.element_ty), mask=m_rows[:, None] & m_cols[None, :])


def down(
    h: Tensor,
    w2: Tensor,
    order: Tensor,
    offsets: Tensor,
    tile_experts: Tensor,
    *,
    tile_rows: int,
    bias2: Tensor | None = None,
) -> Tensor:
    """-> y [S, H] in h's dtype, row t*K + k for expert k of token t; nobody's rows are not written.

    h [S, I] contiguous, rows in expert order; w2 [E, H, I] and bias2 [E, H] of h's dtype and any
    strides; order [S], offsets [E+1] and tile_experts [N] int32 as `permute` made them with the
    same `tile_rows`.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    num_experts, hidden_size, intermediate_size = w2.shape
    if w2.dtype != h.dtype or h.shape != (order.numel(), intermediate_size):
        raise ValueError(
            f"h must be [{order.numel()}, {intermediate_size}] {w2.dtype}, as order and w2 are, "
            f"got {list(h.shape)} {h.dtype}"
        )
    if not h.is_contiguous():
        raise ValueError(f"h must be contiguous, got strides {h.stride()}")
    if offsets.numel() != num_experts + 1:
        raise ValueError(f"offsets must be [{num_experts + 1}], got {list(offsets.shape)}")
    if bias2 is not None and bias2.shape != w2.shape[:2]:
        raise ValueError(f"bias2 must be {list(w2.shape[:2])}, got {list(bias2.shape)}")
    n = tile_experts.numel()
    y = torch.empty(order.numel(), hidden_size, dtype=h.dtype, device=h.device)
    tile = choose_tile(tile_rows, 1, h.dtype, h.device)
    num_programs = n * triton.cdiv(hidden_size, tile.n)
    if num_programs == 0:
        return y
    _down_kernel[(num_programs,)](
        h,
        w2,
        bias2,
        y,
        order,
        offsets,
        tile_experts,
        n,
        intermediate_size,
        hidden_size,
        *w2.stride(),
        *((0, 0) if bias2 is None else bias2.stride()),
        HAS_BIAS=bias2 is not None,
        EVEN_K=intermediate_size % tile.k == 0,
        TILE_PER_ROW=n == order.numel(),
        GROUP_M=GROUP_M,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y

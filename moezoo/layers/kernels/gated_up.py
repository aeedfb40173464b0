"""gated_up: the first grouped product, with the gated activation in its epilogue.

    h[r] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias)
    t = order[r] // K,  e the expert with offsets[e] <= r < offsets[e+1]

and with `Gating`'s bounds where there are some. As [E, 2, I, H], w13 may have its gate and up rows
in any places of memory; as [E, 1, I, H] it has no gate, and h[r] = act(w13[e] @ x[t] + bias).

Products accumulate in fp32, h is rounded once. A tile's gate and up rows lie below each other in
the second operand of one product, and are told apart again in registers; as the first operand
(`weights_first`) they are two products, since the compiler would copy the joint operand.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token, S = T*K rows,
N most tiles (see `permute`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating, in_parts
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.permute import Permutation
from moezoo.layers.kernels.tiles import Tile, descriptor, load_tile, own_tile, swizzle


def gated_up_ref(
    x: Tensor,
    w13: Tensor,
    permutation: Permutation,
    *,
    k: int,
    tile: Tile | None = None,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Tensor:
    gating = Gating.of(activation)
    w13, bias13 = in_parts(w13, bias13)
    order, offsets = permutation.order, permutation.offsets
    h = x.new_zeros(permutation.positions.numel(), w13.shape[2])
    for e in range(w13.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        parts = x[order[rows].long() // k].float() @ w13[e].float().mT  # [1 or 2, rows, I]
        if bias13 is not None:
            parts += bias13[e].float().unsqueeze(1)
        h[rows] = gating(*parts).to(h.dtype)
    return h


@triton.jit
def _sigmoid(x):
    # 1 / (1 + 2^(-x log2 e)), of instructions without branches for special values: a tile's are
    # computed while the matrix units wait.
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2/pi) * (x + 0.044715 x^3).
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return x * _sigmoid(1.702 * x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        # Not maximum(x, 0), which would swallow NaN.
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def activate_gated(
    gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr
):
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_OFFSET != 0.0:
        up += UP_OFFSET
    return activate(gate, ACTIVATION) * up


@triton.jit
def _rows_times_columns(
    expert,
    first_row,
    end,
    first_col,
    x_ptr,
    w,
    bias_ptr,
    h_ptr,
    order_ptr,
    hidden_size,
    intermediate_size,
    k,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wg,
    stride_wn,
    stride_wh,
    stride_be,
    stride_bg,
    stride_bn,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = first_row + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    cols = first_col + tl.arange(0, BLOCK_N)
    m_cols = cols < intermediate_size
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read row 0 and column 0, and are not stored.
    tokens = (tl.load(order_ptr + rows, mask=m_rows, other=0) // k).to(tl.int64)
    p_x = x_ptr + tokens[:, None] * stride_xt + inner[None, :] * stride_xh
    JOINT: tl.constexpr = 1 if WEIGHTS_FIRST else PARTS
    if not DESCRIPTORS:
        part = tl.arange(0, JOINT * BLOCK_N) // BLOCK_N
        w_cols = first_col + tl.arange(0, JOINT * BLOCK_N) % BLOCK_N
        w_cols = tl.where(w_cols < intermediate_size, w_cols, 0)
        o_w = expert.to(tl.int64) * stride_we + part.to(tl.int64) * stride_wg
        p_w = w + (o_w + w_cols.to(tl.int64) * stride_wn)[:, None] + inner[None, :] * stride_wh

    if WEIGHTS_FIRST:
        products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        products = tl.zeros([BLOCK_M, PARTS * BLOCK_N], tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        if not WEIGHTS_FIRST:
            if EVEN_K:
                b_x = tl.load(p_x)
            else:
                b_x = tl.load(p_x, mask=(start + inner < hidden_size)[None, :], other=0.0)
        if DESCRIPTORS:
            b_w = tl.reshape(w.load([expert, 0, first_col, start]), [JOINT * BLOCK_N, BLOCK_K])
        else:
            if EVEN_K:
                b_w = tl.load(p_w)
            else:
                b_w = tl.load(p_w, mask=(start + inner < hidden_size)[None, :], other=0.0)
        if WEIGHTS_FIRST and PARTS == 2:
            if DESCRIPTORS:
                b_up = tl.reshape(w.load([expert, 1, first_col, start]), [BLOCK_N, BLOCK_K])
            elif EVEN_K:
                b_up = tl.load(p_w + stride_wg)
            else:
                m_inner = (start + inner < hidden_size)[None, :]
                b_up = tl.load(p_w + stride_wg, mask=m_inner, other=0.0)
        if WEIGHTS_FIRST:
            # Asked for last, since their addresses arrive later.
            if EVEN_K:
                b_x = tl.load(p_x)
            else:
                b_x = tl.load(p_x, mask=(start + inner < hidden_size)[None, :], other=0.0)
        p_x += BLOCK_K * stride_xh
        if WEIGHTS_FIRST:
            products = tl.dot(b_w, b_x.T, products, input_precision="ieee")
            if PARTS == 2:
                up = tl.dot(b_up, b_x.T, up, input_precision="ieee")
        else:
            products = tl.dot(b_x, b_w.T, products, input_precision="ieee")
        if not DESCRIPTORS:
            p_w += BLOCK_K * stride_wh

    if WEIGHTS_FIRST:
        o_h = rows.to(tl.int64)[None, :] * intermediate_size + cols[:, None]
        m_h = m_rows[None, :] & m_cols[:, None]
    else:
        o_h = rows.to(tl.int64)[:, None] * intermediate_size + cols[None, :]
        m_h = m_rows[:, None] & m_cols[None, :]
    if HAS_BIAS:
        p_bias = bias_ptr + expert.to(tl.int64) * stride_be + cols * stride_bn
        bias = tl.load(p_bias, mask=m_cols, other=0.0).to(tl.float32)
        bias = bias[:, None] if WEIGHTS_FIRST else bias[None, :]
    if PARTS == 2:
        if WEIGHTS_FIRST:
            gate = products
        else:
            halves = tl.permute(tl.reshape(products, [BLOCK_M, 2, BLOCK_N]), [0, 2, 1])
            gate, up = tl.split(halves)
        if HAS_BIAS:
            up_bias = tl.load(p_bias + stride_bg, mask=m_cols, other=0.0).to(tl.float32)
            gate += bias
            up += up_bias[:, None] if WEIGHTS_FIRST else up_bias[None, :]
        h = activate_gated(gate, up, ACTIVATION, LIMIT, UP_OFFSET)
    else:
        if HAS_BIAS:
            products += bias
        h = activate(products, ACTIVATION)
    tl.store(h_ptr + o_h, h.to(h_ptr.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["max_tiles", "k"])
def _gated_up_kernel(
    x_ptr,
    w,
    bias_ptr,
    h_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles_ptr,
    max_tiles,
    hidden_size,
    intermediate_size,
    k,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wg,
    stride_wn,
    stride_wh,
    stride_be,
    stride_bg,
    stride_bn,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    DIRECT: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    num_tiles = tl.load(num_tiles_ptr)
    if DIRECT:
        tile, pid_n, expert, first_row, end = own_tile(tiles_ptr, max_tiles)
        if tile < num_tiles:
            first_col = pid_n * BLOCK_N
            # fmt: off
            _rows_times_columns(
                expert, first_row, end, first_col, x_ptr, w, bias_ptr, h_ptr, order_ptr,
                hidden_size, intermediate_size, k, stride_xt, stride_xh, stride_we, stride_wg,
                stride_wn, stride_wh, stride_be, stride_bg, stride_bn, PARTS, ACTIVATION, LIMIT,
                UP_OFFSET, HAS_BIAS, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N, BLOCK_K,
            )
            # fmt: on
    else:
        num_n = tl.cdiv(intermediate_size, BLOCK_N)
        num_programs = tl.num_programs(0)
        for pid in tl.range(tl.program_id(0), num_tiles * num_n, num_programs, flatten=FLATTEN):
            tile, pid_n = swizzle(pid, num_tiles, num_n, GROUP_M)
            expert, first_row, end = load_tile(tiles_ptr + tile, max_tiles)
            first_col = pid_n * BLOCK_N
            # fmt: off
            if TAIL > 0 and end - first_row <= TAIL:
                _rows_times_columns(
                    expert, first_row, end, first_col, x_ptr, w, bias_ptr, h_ptr, order_ptr,
                    hidden_size, intermediate_size, k, stride_xt, stride_xh, stride_we, stride_wg,
                    stride_wn, stride_wh, stride_be, stride_bg, stride_bn, PARTS, ACTIVATION, LIMIT,
                    UP_OFFSET, HAS_BIAS, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, TAIL, BLOCK_N, BLOCK_K,
                )
            else:
                _rows_times_columns(
                    expert, first_row, end, first_col, x_ptr, w, bias_ptr, h_ptr, order_ptr,
                    hidden_size, intermediate_size, k, stride_xt, stride_xh, stride_we, stride_wg,
                    stride_wn, stride_wh, stride_be, stride_bg, stride_bn, PARTS, ACTIVATION, LIMIT,
                    UP_OFFSET, HAS_BIAS, DESCRIPTORS, EVEN_K, WEIGHTS_FIRST, BLOCK_M, BLOCK_N,
                    BLOCK_K,
                )
            # fmt: on


def gated_up(
    x: Tensor,
    w13: Tensor,
    permutation: Permutation,
    *,
    k: int,
    tile: Tile,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
) -> Tensor:
    """Return h [S, I] in x's dtype, rows in expert order; rows from offsets[E] on are not written.

    x [T, H] and w13 [E, 2I, H], bias13 [E, 2I], all fp32, bf16 or fp16, of any strides; or w13
    [E, 2, I, H] and bias13 [E, 2, I]; or without a gate w13 [E, 1, I, H] and bias13 [E, 1, I].
    `permutation` as `permute` made it with `tile.m` rows a tile.

    Raises ValueError for shapes or dtypes that do not fit, and for an unknown activation.
    """
    gating = Gating.of(activation)
    num_experts, hidden_size = w13.shape[0], w13.shape[-1]
    halves = w13.shape[1] in (1, 2) if w13.ndim == 4 else w13.ndim == 3 and w13.shape[1] % 2 == 0
    if w13.dtype != x.dtype or x.ndim != 2 or x.shape[1] != hidden_size or not halves:
        raise ValueError(
            f"x must be [T, H] and w13 [E, 2I, H] of one dtype, got {list(x.shape)} {x.dtype} and "
            f"{list(w13.shape)} {w13.dtype}"
        )
    order, _, offsets, tiles, num_tiles = permutation
    if order.numel() != x.shape[0] * k or offsets.numel() != num_experts + 1:
        raise ValueError(
            f"order must be [{x.shape[0] * k}] and offsets [{num_experts + 1}], got "
            f"{list(order.shape)} and {list(offsets.shape)}"
        )
    if bias13 is not None and bias13.shape != w13.shape[:-1]:
        raise ValueError(f"bias13 must be {list(w13.shape[:-1])}, got {list(bias13.shape)}")
    w13, bias13 = in_parts(w13, bias13)
    _, num_parts, intermediate_size, _ = w13.shape
    h = torch.empty(order.numel(), intermediate_size, dtype=x.dtype, device=x.device)
    grid = tile.grid(tiles.shape[1], intermediate_size, x.device)
    if 0 in grid:
        return h
    w = w13
    if tile.descriptors:
        w = descriptor(w13, (1, 1 if tile.weights_first else num_parts, tile.n, tile.k))
    _gated_up_kernel[grid](
        x,
        w,
        bias13,
        h,
        order,
        tiles,
        num_tiles,
        tiles.shape[1],
        hidden_size,
        intermediate_size,
        k,
        *x.stride(),
        *w13.stride(),
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        DESCRIPTORS=tile.descriptors,
        EVEN_K=hidden_size % tile.k == 0,
        WEIGHTS_FIRST=tile.weights_first,
        DIRECT=tile.direct,
        FLATTEN=tile.flattened,
        GROUP_M=tile.group_m,
        TAIL=tile.tail,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device, persistent=tile.persistent),
    )
    return h

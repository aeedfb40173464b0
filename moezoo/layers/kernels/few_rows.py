"""few_rows_linear: a linear layer on a few rows, at the speed at which memory delivers the weights.

    y = rmsnorm(x) @ weight.T + bias, or x @ weight.T + bias
    y = residual + y, if there is a residual

For up to four rows a program holds whole rows of the weight in registers: it asks for all of them
at once, before the kernel that computes x has finished. For more, the matrix units multiply what
copies bring to shared memory, each warp its part of the columns. Norm and residual cost no launch
of their own; each program computes the norm again. Products accumulate in fp32. The normed x, the
linear layer's result and the sum with the residual are rounded one after the other, as separate
operations round them.

Legend: T rows of x, K inputs, N outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, start_next, wait, wait_for_previous
from moezoo.layers.kernels.tiles import multiprocessors

FEW_ROWS = 8
"""The most rows of x."""

REGISTER_ROWS = 4
"""The most rows of 16-bit x whose products are made in ordinary registers.

They lie there too, so all together have at most 16384 columns.
"""


def few_rows_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    if norm_weight is not None:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = (wide * scale * norm_weight.float()).to(x.dtype)
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return y if residual is None else residual + y


@triton.jit
def _load_rows(w_ptr, rows, inner, n, k, stride_wn, EVEN_K: tl.constexpr):
    p_w = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + inner
    m_w = (rows < n)[:, None]
    if not EVEN_K:
        m_w = m_w & (inner < k)
    return tl.load(p_w, mask=m_w, other=0.0)


@triton.jit(do_not_specialize=["n", "num_programs"])
def _few_rows_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    n,
    k,
    num_programs,
    eps,
    stride_xt,
    stride_wn,
    stride_rt,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    inner = tl.arange(0, BLOCK_K)[None, :]
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = _load_rows(w_ptr, rows, inner, n, k, stride_wn, EVEN_K)
    if HAS_NORM:
        norm = tl.load(norm_ptr + inner, mask=inner < k, other=0.0)
    wait_for_previous(OVERLAP)
    token = tl.program_id(1)
    x_ptr += token * stride_xt
    y_ptr += token * n
    if HAS_RESIDUAL:
        residual_ptr += token * stride_rt
    xs = ()
    for t in tl.static_range(T):
        x = tl.load(x_ptr + t * stride_xt + inner, mask=inner < k, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 1) / k + eps)
            x = (wide * scale[:, None] * norm.to(tl.float32)).to(x.dtype)
        xs += (x,)
    if ONE_TILE:
        # fmt: off
        _store_products(
            xs, w, bias_ptr, residual_ptr, y_ptr, rows, n, stride_rt, T, HAS_BIAS, HAS_RESIDUAL
        )
        # fmt: on
    else:
        for _ in range(tl.program_id(0) * BLOCK_N, n, num_programs * BLOCK_N):
            next_rows = rows + num_programs * BLOCK_N
            next_w = _load_rows(w_ptr, next_rows, inner, n, k, stride_wn, EVEN_K)
            # fmt: off
            _store_products(
                xs, w, bias_ptr, residual_ptr, y_ptr, rows, n, stride_rt, T, HAS_BIAS, HAS_RESIDUAL
            )
            # fmt: on
            rows = next_rows
            w = next_w


@triton.jit
def _store_products(
    xs,
    w,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    n,
    stride_rt,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    m_rows = rows < n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=m_rows, other=0.0).to(tl.float32)
    wide = w.to(tl.float32)
    for t in tl.static_range(T):
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + t * stride_rt + rows, mask=m_rows, other=0.0)
        y = tl.sum(wide * xs[t].to(tl.float32), 1)
        if HAS_BIAS:
            y += bias
        y = y.to(y_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            y = (residual.to(tl.float32) + y.to(tl.float32)).to(y.dtype)
        tl.store(y_ptr + t * n + rows, y, mask=m_rows)


@triton.jit(do_not_specialize=["n"])
def _few_rows_dot_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    n,
    k,
    eps,
    stride_xt,
    stride_wn,
    stride_rt,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    # Each warp multiplies one of PARTS parts of BLOCK_K.
    part: tl.constexpr = BLOCK_K // PARTS
    inner = tl.arange(0, PARTS)[:, None, None] * part + tl.arange(0, part)[None, None, :]
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_rows = rows < n
    p_w = w_ptr + rows.to(tl.int64)[None, :, None] * stride_wn + inner
    m_w = m_rows[None, :, None]
    tokens = tl.arange(0, BLOCK_T)
    m_x = (tokens < T)[None, :, None]
    p_x = x_ptr + tokens[None, :, None] * stride_xt + inner
    if HAS_NORM:
        squares = tl.zeros([PARTS, BLOCK_T, part], tl.float32)
        for start in range(0, k, BLOCK_K):
            wide = tl.load(p_x + start, mask=m_x & (start + inner < k), other=0.0).to(tl.float32)
            squares += wide * wide
        scale = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / k + eps)[None, :, None]
    products = tl.zeros([PARTS, BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, k, BLOCK_K):
        m_inner = start + inner < k
        w = tl.load(p_w + start, mask=m_w & m_inner, other=0.0)
        x = tl.load(p_x + start, mask=m_x & m_inner, other=0.0)
        if HAS_NORM:
            norm = tl.load(norm_ptr + start + inner, mask=m_inner, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * scale * norm).to(x.dtype)
        products = tl.dot(w, tl.permute(x, [0, 2, 1]), products, input_precision="ieee")
    y = tl.sum(products, 0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=m_rows, other=0.0).to(tl.float32)[:, None]
    y = y.to(y_ptr.dtype.element_ty)
    m_y = m_rows[:, None] & (tokens < T)[None, :]
    if HAS_RESIDUAL:
        p_residual = residual_ptr + tokens[None, :] * stride_rt + rows[:, None]
        residual = tl.load(p_residual, mask=m_y, other=0.0)
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(y.dtype)
    tl.store(y_ptr + tokens[None, :] * n + rows[:, None], y, mask=m_y)


@dataclass(frozen=True)
class Launch:
    """What one program works on: block_n rows of the weight.

    With block_k 0 it holds them in registers, and programs_per_sm programs a multiprocessor share
    out all the rows, or each has its own block_n if that is 0. Otherwise the matrix units get
    block_k columns at a time, and num_stages times as many are on their way.
    """

    block_n: int
    num_warps: int
    programs_per_sm: int = 0
    block_k: int = 0
    num_stages: int = 1


def launch(num_rows: int, n: int, k: int, itemsize: int, device: torch.device) -> Launch:
    """How `few_rows_linear` runs for x [num_rows, k] and weight [n, k] of `itemsize` bytes.

    Figures are microseconds on one H100 in bf16.
    """
    block_k = triton.next_power_of_2(k)
    if itemsize == 2 and num_rows > min(REGISTER_ROWS, 16384 // block_k):
        # T=8, n=5120, k=2048: 10.3, and 11.2 with weights brought to L2 first; cuBLAS 10.1.
        return Launch(16, num_warps=4, block_k=512, num_stages=4)
    row_bytes = block_k * itemsize
    if row_bytes > 16384:
        # T=1, n=2048, k=10944: 17.0, and 17.8 with 8 warps; cuBLAS 20.2.
        return Launch(1, num_warps=16)
    # A thread holds up to 128 bytes of the weight. Where programs would come and go some ten times
    # on a multiprocessor, those that stay ask for their next rows while they multiply.
    # T=1, n=6144, k=2048: 9.5, and 10.0 with programs that come and go; n=151936: 202 and 199.
    block_n = min(4, 16384 // row_bytes)
    if 8 <= triton.cdiv(n, block_n) / multiprocessors(device) < 32:
        return Launch(block_n, num_warps=4, programs_per_sm=4)
    # T=2, n=2048, k=2048: 3.9, and 4.8 with 4 rows. k=4096: 7.3 with 2 rows, cuBLAS 10.2.
    block_n = min(2, block_n)
    return Launch(block_n, num_warps=max(1, triton.cdiv(block_n * row_bytes, 4096)))


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """x [T, K] with T <= FEW_ROWS, weight [N, K], both of x's dtype -> [T, N] in x's dtype.

    bias [N]; norm_weight [K], with it x is RMS-normed over K first; residual [T, N] is added last.
    Last strides are 1. Weights must not be written by the kernel launched just before.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or len(x) > FEW_ROWS:
        raise ValueError(
            f"x must be [T, K] with T <= {FEW_ROWS} and weight [N, K], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    (num_rows, k), n = x.shape, len(weight)
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    if norm_weight is not None and norm_weight.shape != (k,):
        raise ValueError(f"norm_weight must be [{k}], got {list(norm_weight.shape)}")
    if residual is not None and (residual.shape != (num_rows, n) or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be [{num_rows}, {n}] {x.dtype}, "
            f"got {list(residual.shape)} {residual.dtype}"
        )
    operands = {"x": x, "weight": weight, "bias": bias}
    operands |= {"norm_weight": norm_weight, "residual": residual}
    for name, tensor in operands.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s last stride must be 1, got strides {tensor.stride()}")
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chosen = launch(num_rows, n, k, x.dtype.itemsize, x.device)
    num_tiles = triton.cdiv(n, chosen.block_n)
    tensors = (x, weight, bias, norm_weight, residual, y)
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    settings = {
        "HAS_BIAS": bias is not None,
        "HAS_NORM": norm_weight is not None,
        "HAS_RESIDUAL": residual is not None,
        "BLOCK_N": chosen.block_n,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        **launch_options(x.device),
    }
    if chosen.block_k:
        _few_rows_dot_kernel[(num_tiles,)](
            *tensors,
            n,
            k,
            eps,
            *strides,
            T=num_rows,
            BLOCK_T=8,
            BLOCK_K=chosen.block_k,
            PARTS=chosen.num_warps,
            **settings,
        )
        return y
    # 4-byte rows of x would not fit beside the weights.
    rows_of_x = num_rows if x.dtype.itemsize == 2 else 1
    num_programs = num_tiles
    if chosen.programs_per_sm:
        num_programs = min(num_tiles, chosen.programs_per_sm * multiprocessors(x.device))
    block_k = triton.next_power_of_2(k)
    _few_rows_kernel[(num_programs, num_rows // rows_of_x)](
        *tensors,
        n,
        k,
        num_programs,
        eps,
        *strides,
        T=rows_of_x,
        EVEN_K=block_k == k,
        ONE_TILE=num_programs == num_tiles,
        BLOCK_K=block_k,
        **settings,
    )
    return y

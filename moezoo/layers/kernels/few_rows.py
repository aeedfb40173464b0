"""few_rows_linear: a linear layer on a few rows, at the speed at which memory delivers the weights.

    few_rows_linear    y = x @ weight.T + bias
    add_norm_linear    sum = x + update, y = rmsnorm(sum) @ weight.T + bias
    gated_linear       y = (act(gate) * up) @ weight.T + bias + addend

For up to four rows a program holds whole rows of the weight in registers: it asks for all of them
at once, before the kernel that computes x has finished. Each program computes sum and norm, or the
gated activation, again, which costs less than a launch. For more rows the matrix units multiply
what copies bring to shared memory, each warp its part of the columns. Products accumulate in fp32.
The sum, the normed x, the gated activation, y and its sum with the addend are rounded one after the
other, as separate operations round them.

Legend: T rows of x, K inputs, N outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.add_norm import add_rms_norm, add_rms_norm_ref
from moezoo.layers.kernels.gated import gate_ref
from moezoo.layers.kernels.gated_up import activate_gated
from moezoo.layers.kernels.overlap import launch_options, start_next, wait, wait_for_previous
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.tiles import multiprocessors

FEW_ROWS = 8
"""Most rows of x."""

REGISTER_ROWS = 4
"""Most rows of 16-bit x whose products are made in ordinary registers.

The rows lie in registers too, so together they have at most 16384 columns.
"""

GATED_COLUMNS = 4096
"""Most inputs of a `gated_linear`: each program reads and gates them all."""


def few_rows_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def add_norm_linear_ref(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    normed, total = add_rms_norm_ref(x, update, norm_weight, eps, offset=offset)
    return few_rows_linear_ref(normed, weight, bias), total


def gated_linear_ref(
    gate_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | Gating = "silu",
    addend: Tensor | None = None,
) -> Tensor:
    y = few_rows_linear_ref(gate_ref(gate_up, activation), weight, bias)
    return y if addend is None else y + addend


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
    update_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    addend_ptr,
    y_ptr,
    sum_ptr,
    n,
    k,
    num_programs,
    eps,
    stride_xt,
    stride_ut,
    stride_wn,
    stride_at,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    inner = tl.arange(0, BLOCK_K)[None, :]
    m_inner = inner < k
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = _load_rows(w_ptr, rows, inner, n, k, stride_wn, EVEN_K)
    if HAS_NORM:
        norm = tl.load(norm_ptr + inner, mask=m_inner, other=0.0)
    wait_for_previous(OVERLAP)
    token = tl.program_id(1)
    x_ptr += token * stride_xt
    y_ptr += token * n
    if HAS_ADDEND:
        addend_ptr += token * stride_at
    xs = ()
    for t in tl.static_range(T):
        x = tl.load(x_ptr + t * stride_xt + inner, mask=m_inner, other=0.0)
        if ACTIVATION is not None:
            up = tl.load(x_ptr + t * stride_xt + k + inner, mask=m_inner, other=0.0)
            wide = x.to(tl.float32)
            h = activate_gated(wide, up.to(tl.float32), ACTIVATION, LIMIT, UP_OFFSET)
            x = h.to(up.dtype)
        xs += (x,)
    if HAS_UPDATE:
        update_ptr += token * stride_ut
        sum_ptr += token * k
        sums = ()
        for t in tl.static_range(T):
            update = tl.load(update_ptr + t * stride_ut + inner, mask=m_inner, other=0.0)
            sums += ((xs[t].to(tl.float32) + update.to(tl.float32)).to(update.dtype),)
        if tl.program_id(0) == 0:
            for t in tl.static_range(T):
                tl.store(sum_ptr + t * k + inner, sums[t], mask=m_inner)
        xs = sums
    if HAS_NORM:
        normed = ()
        for t in tl.static_range(T):
            wide = xs[t].to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 1) / k + eps)
            normed += ((wide * scale[:, None] * (norm.to(tl.float32) + OFFSET)).to(xs[t].dtype),)
        xs = normed
    if ONE_TILE:
        _store_products(
            xs, w, bias_ptr, addend_ptr, y_ptr, rows, n, stride_at, T, HAS_BIAS, HAS_ADDEND
        )
    else:
        for _ in range(tl.program_id(0) * BLOCK_N, n, num_programs * BLOCK_N):
            next_rows = rows + num_programs * BLOCK_N
            next_w = _load_rows(w_ptr, next_rows, inner, n, k, stride_wn, EVEN_K)
            _store_products(
                xs, w, bias_ptr, addend_ptr, y_ptr, rows, n, stride_at, T, HAS_BIAS, HAS_ADDEND
            )
            rows = next_rows
            w = next_w


@triton.jit
def _store_products(
    xs,
    w,
    bias_ptr,
    addend_ptr,
    y_ptr,
    rows,
    n,
    stride_at,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
):
    m_rows = rows < n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=m_rows, other=0.0).to(tl.float32)
    wide = w.to(tl.float32)
    for t in tl.static_range(T):
        y = tl.sum(wide * xs[t].to(tl.float32), 1)
        if HAS_BIAS:
            y += bias
        y = y.to(y_ptr.dtype.element_ty)
        if HAS_ADDEND:
            addend = tl.load(addend_ptr + t * stride_at + rows, mask=m_rows, other=0.0)
            y = (y.to(tl.float32) + addend.to(tl.float32)).to(y.dtype)
        tl.store(y_ptr + t * n + rows, y, mask=m_rows)


@triton.jit(do_not_specialize=["n"])
def _few_rows_dot_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    n,
    k,
    stride_xt,
    stride_wn,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    products = tl.zeros([PARTS, BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, k, BLOCK_K):
        m_inner = start + inner < k
        w = tl.load(p_w + start, mask=m_w & m_inner, other=0.0)
        x = tl.load(p_x + start, mask=m_x & m_inner, other=0.0)
        products = tl.dot(w, tl.permute(x, [0, 2, 1]), products, input_precision="ieee")
    y = tl.sum(products, 0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=m_rows, other=0.0).to(tl.float32)[:, None]
    p_y = y_ptr + tokens[None, :] * n + rows[:, None]
    m_y = m_rows[:, None] & (tokens < T)[None, :]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_y)


@dataclass(frozen=True)
class Launch:
    """Launch options. A program works on block_n rows of the weight at a time.

    With block_k = 0 it holds them in registers: programs_per_sm programs per multiprocessor share
    all the rows, or, if that is 0, each program has block_n rows of its own. Otherwise the matrix
    units get block_k columns at a time, with num_stages blocks of columns in flight.
    """

    block_n: int
    num_warps: int
    programs_per_sm: int = 0
    block_k: int = 0
    num_stages: int = 1


def launch(x: Tensor, weight: Tensor) -> Launch:
    """Return the options to multiply x [T, K] by weight [N, K].

    Figures are microseconds on one H100 in bf16.
    """
    (num_rows, k), n, itemsize = x.shape, len(weight), x.dtype.itemsize
    block_k = next_power_of_2(k)
    if itemsize == 2 and num_rows > min(REGISTER_ROWS, 16384 // block_k):
        # T=8, n=5120, k=2048: 10.3, and 11.2 with weights brought to L2 first; cuBLAS 10.1.
        return Launch(16, num_warps=4, block_k=512, num_stages=4)
    row_bytes = block_k * itemsize
    if row_bytes > 16384:
        # T=1, n=2048, k=10944: 17.0, and 17.8 with 8 warps; cuBLAS 20.2.
        return Launch(1, num_warps=16)
    # A thread holds up to 128 bytes of the weight.
    block_n = min(4, 16384 // row_bytes)
    rounds = cdiv(n, block_n) / multiprocessors(x.device)
    if 8 <= rounds < 32 and num_rows * block_k <= 4096:
        # Four programs that fit on a multiprocessor stay there, and ask for their next rows while
        # they multiply. T=1, n=6144, k=2048: 9.5, and 10.0 with programs that come and go. With
        # more rows these are the better ones: n=151936: 202 and 199.
        return Launch(block_n, num_warps=4, programs_per_sm=4)
    # T=2, n=2048, k=2048: 3.9, and 4.8 with 4 rows; cuBLAS 6.2.
    block_n = min(2, block_n)
    return Launch(block_n, num_warps=max(1, cdiv(block_n * row_bytes, 4096)))


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias: x [T, K], T <= FEW_ROWS, weight [N, K], bias [N] -> y [T, N].

    All have x's dtype.
    Last strides are 1. Weights must not be written by the kernel launched just before.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    _check(x, weight, bias)
    chosen = launch(x, weight)
    if not chosen.block_k:
        return _in_registers(x, weight, bias, chosen)[0]
    num_rows, n = len(x), len(weight)
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    _few_rows_dot_kernel[(cdiv(n, chosen.block_n),)](
        x,
        weight,
        bias,
        y,
        n,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        T=num_rows,
        HAS_BIAS=bias is not None,
        BLOCK_T=8,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        PARTS=chosen.num_warps,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        **launch_options(x.device),
    )
    return y


def add_norm_linear(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return y [T, N] of the normed sum, and the sum [T, K] of x and update, both [T, K].

    weight is [N, K], bias [N], norm_weight [K]. Arguments and errors are those of
    `few_rows_linear`. It is one launch where registers hold x. Without an update the sum is x
    itself, not a copy. The norm's weight, to which `offset` is added, may have a dtype of its own.
    """
    _check(x, weight, bias)
    if update is not None and (update.shape != x.shape or update.dtype != x.dtype):
        raise ValueError(
            f"update must be {list(x.shape)} {x.dtype} as x is, "
            f"got {list(update.shape)} {update.dtype}"
        )
    if norm_weight.shape != (x.shape[1],):
        raise ValueError(f"norm_weight must be [{x.shape[1]}], got {list(norm_weight.shape)}")
    _check_strides(update=update, norm_weight=norm_weight)
    chosen = launch(x, weight)
    if chosen.block_k:
        normed, total = add_rms_norm(x, update, norm_weight, eps, offset=offset)
        return few_rows_linear(normed, weight, bias), total
    norm = {"norm_weight": norm_weight, "eps": eps, "offset": offset}
    return _in_registers(x, weight, bias, chosen, update=update, **norm)


def takes_gated(gate_up: Tensor, weight: Tensor) -> bool:
    """Whether `gated_linear` takes it, and faster than with a launch for the activation."""
    if len(gate_up) > REGISTER_ROWS or weight.shape[1] > GATED_COLUMNS:
        return False
    return not launch(gate_up[:, : weight.shape[1]], weight).block_k


def gated_linear(
    gate_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | Gating = "silu",
    addend: Tensor | None = None,
) -> Tensor:
    """Return y [T, N] of the gated activation of gate_up [T, 2K], each row gate before up.

    weight is [N, K], bias [N], addend [T, N], all of gate_up's dtype. `takes_gated` must hold;
    arguments and errors are otherwise those of `few_rows_linear`.
    """
    k = weight.shape[1]
    if gate_up.ndim != 2 or gate_up.shape[1] != 2 * k:
        raise ValueError(
            f"gate_up must be [T, {2 * k}] for weight {list(weight.shape)}, "
            f"got {list(gate_up.shape)}"
        )
    x = gate_up[:, :k]
    _check(x, weight, bias)
    chosen = launch(x, weight)
    if chosen.block_k:
        raise ValueError(f"{len(x)} rows of {k} are too many; take gate and few_rows_linear")
    expected = (len(x), len(weight))
    if addend is not None and (addend.shape != expected or addend.dtype != x.dtype):
        raise ValueError(
            f"addend must be {list(expected)} {x.dtype}, got {list(addend.shape)} {addend.dtype}"
        )
    _check_strides(addend=addend)
    gating = Gating.of(activation)
    return _in_registers(x, weight, bias, chosen, gating=gating, addend=addend)[0]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or len(x) > FEW_ROWS:
        raise ValueError(
            f"x must be [T, K] with T <= {FEW_ROWS} and weight [N, K], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}")
    _check_strides(x=x, weight=weight, bias=bias)


def _check_strides(**operands: Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s last stride must be 1, got strides {tensor.stride()}")


def _in_registers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: Launch,
    *,
    update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gating: Gating | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the products in registers. With `gating`, x is the gate half of gate_up's rows."""
    (num_rows, k), n = x.shape, len(weight)
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    total = x
    if update is not None:
        total = torch.empty(num_rows, k, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y, total
    # 4-byte rows of x would not fit beside the weights.
    rows_of_x = num_rows if x.dtype.itemsize == 2 else 1
    # The first program writes the sum, even if there is nothing to multiply.
    num_tiles = max(1, cdiv(n, chosen.block_n))
    num_programs = num_tiles
    if chosen.programs_per_sm:
        num_programs = min(num_tiles, chosen.programs_per_sm * multiprocessors(x.device))
    block_k = next_power_of_2(k)
    _few_rows_kernel[(num_programs, num_rows // rows_of_x)](
        x,
        update,
        norm_weight,
        weight,
        bias,
        addend,
        y,
        total,
        n,
        k,
        num_programs,
        eps,
        x.stride(0),
        0 if update is None else update.stride(0),
        weight.stride(0),
        0 if addend is None else addend.stride(0),
        T=rows_of_x,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        OFFSET=offset,
        HAS_UPDATE=update is not None,
        HAS_ADDEND=addend is not None,
        ACTIVATION=None if gating is None else ACTIVATIONS[gating.activation].__name__,
        LIMIT=None if gating is None else gating.limit,
        UP_OFFSET=0.0 if gating is None else gating.up_offset,
        EVEN_K=block_k == k,
        ONE_TILE=num_programs == num_tiles,
        BLOCK_N=chosen.block_n,
        BLOCK_K=block_k,
        num_warps=chosen.num_warps,
        **launch_options(x.device),
    )
    return y, total

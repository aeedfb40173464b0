"""pack_rows and unpack_rows: tokens and their choices to and from rows of bytes, see `row_format`.

Their references are in `row_format`, since a CPU runs them and may have no Triton.

Legend: T tokens, H hidden, K experts per token, N rows, W bytes of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.quantize import fp8_factor
from moezoo.layers.kernels.row_format import RowFormat
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.quant.fp8 import BLOCK

GROUPS = 8
"""Groups of 128 numbers that a program takes."""

CHOICES = 256
"""Number of choices that a program unpacks."""


@triton.jit(do_not_specialize=["num_tokens"])
def _pack_rows_kernel(
    x_ptr,
    topk_weights_ptr,
    topk_slots_ptr,
    numbers_ptr,
    scales_ptr,
    weights_ptr,
    slots_ptr,
    num_tokens,
    hidden_size,
    stride_xt,
    stride_n,
    stride_c,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    is_token = row < num_tokens
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_x = is_token & (cols < hidden_size)
    x = tl.load(x_ptr + row * stride_xt + cols, mask=m_x, other=0.0)
    if FP8:
        x = x.to(tl.float32)
        factors, scales = fp8_factor(tl.max(tl.abs(x), 1))
        m_group = is_token & (group * GROUP < hidden_size)
        x8 = (x * factors[:, None]).to(numbers_ptr.dtype.element_ty)
        tl.store(numbers_ptr + row * stride_n + cols, x8, mask=m_group[:, None])
        tl.store(scales_ptr + row * stride_c + group, scales, mask=m_group)
    else:
        tl.store(numbers_ptr + row * stride_n + cols, x, mask=m_x)
    if tl.program_id(1) == 0:
        k = tl.arange(0, BLOCK_K)
        m_k = k < K
        m_chosen = is_token & m_k
        weights = tl.load(topk_weights_ptr + row * K + k, mask=m_chosen, other=0.0)
        slots = tl.load(topk_slots_ptr + row * K + k, mask=m_chosen, other=-1)
        tl.store(weights_ptr + row * stride_c + k, weights, mask=m_k)
        tl.store(slots_ptr + row * stride_c + k, slots.to(tl.int32), mask=m_k)


@triton.jit
def _dequantize_kernel(
    numbers_ptr,
    scales_ptr,
    x_ptr,
    hidden_size,
    stride_n,
    stride_s,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_x = cols < hidden_size
    x8 = tl.load(numbers_ptr + row * stride_n + cols, mask=m_x)
    scales = tl.load(scales_ptr + row * stride_s + group, mask=group * GROUP < hidden_size)
    x = x8.to(tl.float32) * scales[:, None]
    tl.store(x_ptr + row * hidden_size + cols, x.to(x_ptr.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["num_choices", "first", "stop"])
def _choices_kernel(
    weights_ptr,
    slots_ptr,
    topk_weights_ptr,
    local_ptr,
    num_choices,
    first,
    stop,
    stride_w,
    stride_s,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    choices = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_choices = choices < num_choices
    row, k = choices // K, choices % K
    slots = tl.load(slots_ptr + row * stride_s + k, mask=m_choices, other=-1)
    here = (slots >= first) & (slots < stop)
    tl.store(local_ptr + choices, tl.where(here, slots - first, -1).to(tl.int32), mask=m_choices)
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + row * stride_w + k, mask=m_choices, other=0.0)
        tl.store(topk_weights_ptr + choices, weights, mask=m_choices)


def pack_rows(
    form: RowFormat, x: Tensor, topk_weights: Tensor, slots: Tensor, num_rows: int
) -> Tensor:
    """Return x [T, H], topk_weights fp32 and slots int [T, K] as rows uint8 [num_rows, W].

    There may be more rows than tokens.

    Raises ValueError for more tokens than rows, or what does not fit the format.
    """
    expected = (len(x), form.hidden_size), (len(x), form.k)
    if (x.shape, slots.shape) != expected or len(x) > num_rows or x.dtype != form.dtype:
        raise ValueError(
            f"x must be {list(expected[0])} {form.dtype} and slots {list(expected[1])}, of at most "
            f"{num_rows} tokens, got {list(x.shape)} {x.dtype} and {list(slots.shape)}"
        )
    rows = torch.empty(num_rows, form.width, dtype=torch.uint8, device=x.device)
    if num_rows == 0:
        return rows
    weights, x = form.weights(rows), x.contiguous()
    numbers, scales = form.octets(rows) if form.fp8 else (form.numbers(rows), weights)
    _pack_rows_kernel[(num_rows, cdiv(form.hidden_size, GROUPS * BLOCK))](
        *(x, topk_weights.contiguous(), slots.contiguous()),
        *(numbers, scales, weights, form.slots(rows)),
        *(len(x), form.hidden_size, x.stride(0), numbers.stride(0), weights.stride(0)),
        K=form.k,
        BLOCK_K=next_power_of_2(form.k),
        GROUPS=GROUPS,
        GROUP=BLOCK,
        FP8=form.fp8,
    )
    return rows


def unpack_rows(
    form: RowFormat, rows: Tensor, first: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [N, H], topk_weights fp32 [N, K] and local slots int32 [N, K] of rows uint8 [N, W].

    x is a view unless it came in fp8. The slots `first` to `stop` are counted from `first`; all
    others are -1.
    """
    weights, slots = form.weights(rows), form.slots(rows)
    topk_weights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device)
    local = torch.empty(slots.shape, dtype=slots.dtype, device=rows.device)
    _take_choices(weights, slots, topk_weights, local, first, stop)
    if not form.fp8:
        return form.numbers(rows), topk_weights, local
    x = torch.empty(len(rows), form.hidden_size, dtype=form.dtype, device=rows.device)
    octets = form.octets(rows)
    if len(rows):
        _dequantize_kernel[(len(rows), cdiv(form.hidden_size, GROUPS * BLOCK))](
            *(octets.data, octets.scales, x, form.hidden_size),
            *(octets.data.stride(0), octets.scales.stride(0)),
            GROUPS=GROUPS,
            GROUP=BLOCK,
        )
    return x, topk_weights, local


def local_rows(slots: Tensor, first: int, stop: int) -> Tensor:
    """Return slots int [T, K] as local slots int32 [T, K], as `unpack_rows` does."""
    local = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    _take_choices(None, slots.contiguous(), None, local, first, stop)
    return local


def _take_choices(
    weights: Tensor | None,
    slots: Tensor,
    topk_weights: Tensor | None,
    local: Tensor,
    first: int,
    stop: int,
) -> None:
    num_choices = local.numel()
    if num_choices == 0:
        return
    _choices_kernel[(cdiv(num_choices, CHOICES),)](
        *(weights, slots, topk_weights, local, num_choices, first, stop),
        *(0 if weights is None else weights.stride(0), slots.stride(0)),
        K=slots.shape[1],
        HAS_WEIGHTS=weights is not None,
        BLOCK=CHOICES,
    )

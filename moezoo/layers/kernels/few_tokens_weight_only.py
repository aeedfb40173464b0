"""few_tokens_weight_only: the experts of a token or a few, their weights of 4 or 8 bits.

    h[t, k] = act(w13[e][:I] @ x[t] + bias) * (w13[e][I:] @ x[t] + bias),  e = topk_ids[t, k]
    out[t]  = sum over k with topk_ids[t, k] in 0..E-1 of
              topk_weights[t, k] * (w2[e] @ h[t, k] + bias)

As in `few_tokens` nothing is permuted, products are made and summed in ordinary registers, and the
second kernel sums over K and reads its first weights while the first one ends. Weights come as
words of 32 bits. What integers in them stand for is found without a conversion: under the bits of
2^23 a field of a word is that much more in fp32.

Rounding points are those of `packed_operand` with few rows: integers are exact in the products,
whose sums over a group of columns are scaled in fp32. h, and each expert's row of the sum, are
rounded once, as is the sum. What a token gets does not depend on the others.

Legend: T tokens, H hidden, I expert intermediate, E experts, K experts per token.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.few_tokens import check_shapes, few_tokens_ref
from moezoo.layers.kernels.gated_up import activate, activate_gated
from moezoo.layers.kernels.overlap import launch_options, start_next, wait, wait_for_previous
from moezoo.layers.kernels.packed_operand import FORMATS
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.unpack import factors
from moezoo.layers.quant import Mxfp4, WeightOnly
from moezoo.layers.quant.mxfp4 import GROUP

WORD = 4
"""Bytes of a word."""

QUAD = 4
"""Columns of x that are read together, as 64 bits."""

GROUP_WORDS = 16
"""Most words whose products are summed before they are scaled; a group may have more."""

UP_BLOCK = (8, 256, 4)
DOWN_BLOCK = (4, 32, 8)
"""Columns and words of a row that a program of either kernel works on at a time, and its warps."""

MANY_WEIGHTS = 20_000_000
"""Number of a token's weights in w2 from which the matrix units win despite more launches."""

PIECES = 4
"""Blocks of a row that the second kernel loads at once."""


def few_tokens_weight_only_ref(
    x: Tensor,
    w13: WeightOnly,
    w2: WeightOnly,
    *,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    return few_tokens_ref(
        *(x, w13.dequantize(), w2.dequantize()),
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        activation=activation,
        bias13=bias13,
        bias2=bias2,
    )


@triton.jit
def _places(G: tl.constexpr, W: tl.constexpr):
    """[G, 1, 1, W] of words. Lanes take turns at them, as at the columns, which so stay where they
    are: no thread has several words in a row."""
    words = tl.arange(0, G)[:, None] * W + tl.arange(0, W)[None, :]
    return tl.multiple_of(words, [1, 1])[:, None, None, :]


@triton.jit
def _columns(
    p_row,
    m_rows,
    first,
    num_words,
    dtype: tl.constexpr,
    WAYS: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
):
    """The columns of words from `first` on: WAYS tensors [G, S, 1, W] in fp32.

    p_row [S] at rows of `dtype`, read four columns at a time: few numbers change threads.
    """
    S: tl.constexpr = p_row.shape[0]
    QUADS: tl.constexpr = WAYS // 4
    words = first + tl.multiple_of(tl.arange(0, G * W), 1)
    mask = (words < num_words)[:, None, None] & m_rows[None, :, None]
    quads = (words[:, None] * QUADS + tl.arange(0, QUADS)[None, :])[:, None, :]
    x = tl.load(p_row[None, :, None] + quads, mask=mask, other=0)
    if QUADS == 2:
        parts = tl.split(x)
    else:
        tl.static_assert(QUADS == 1)
        parts = (x,)
    columns = ()
    for i in tl.static_range(QUADS):
        quad = tl.trans(tl.reshape(parts[i], [G, W, S]), (0, 2, 1))[:, :, None, :]
        for place in tl.static_range(4):
            column = (quad >> (16 * place)).to(tl.int16).to(dtype, bitcast=True)
            columns += (column.to(tl.float32),)
    return columns


@triton.jit
def _sums(words, x, FORMAT: tl.constexpr, WAYS: tl.constexpr):
    """Of each group, the codes times x: words [G, S, N, W] int32, x as `_columns` -> [G, S, N].

    Codes are 0..15 (int4), -128 less than 0..255 (int8), or numbers of E2M1.
    """
    total = tl.zeros(words.shape, tl.float32)
    BITS: tl.constexpr = 32 // WAYS
    # So many fields fit beside each other under the bits of 2^23.
    FIELDS: tl.constexpr = 23 // BITS
    if FORMAT == "int8":
        words ^= 0x80808080 - (1 << 32)
    for way in tl.static_range(WAYS):
        if FORMAT == "mxfp4":
            code = words >> (BITS * way)
            # As an exponent and a mantissa of fp32 they are 2^-126 of what they should be.
            bits = ((code & 7) << 22) | ((code & 8) << 28)
            total += bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * x[way]
        else:
            place = way % FIELDS
            field = (words >> (BITS * (way - place))) & (((1 << BITS) - 1) << (BITS * place))
            value = (field | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            total += value * (x[way] * (1.0 / (1 << (BITS * place))))
    return tl.sum(total, 3)


@triton.jit
def _sums_of_columns(x, WAYS: tl.constexpr):
    """[G, S, 1]: what zero points are multiplied by."""
    total = x[0]
    for way in tl.static_range(1, WAYS):
        total += x[way]
    return tl.sum(total, 3)


@triton.jit
def _scaled(
    sums,
    x_sums,
    p_scales,
    p_zeros,
    mask,
    FORMAT: tl.constexpr,
):
    """sums [G, S, N] of codes -> of weights; x_sums [G, S, 1]."""
    scales = tl.load(p_scales, mask=mask, other=0)
    if FORMAT == "mxfp4":
        return sums * factors(scales, tl.float32, False)
    if p_zeros is None:
        sums -= (128.0 if FORMAT == "int8" else 8.0) * x_sums
    else:
        sums -= tl.load(p_zeros, mask=mask, other=0).to(tl.float32) * x_sums
    return sums * scales.to(tl.float32)


@triton.jit(do_not_specialize=["k"])
def _few_tokens_gated_up_weight_only_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    ids_ptr,
    h_ptr,
    num_experts,
    num_words,
    intermediate_size,
    k,
    stride_xt,
    stride_we,
    stride_wp,
    stride_wn,
    stride_se,
    stride_sp,
    stride_sn,
    stride_be,
    stride_bp,
    stride_bn,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        cols = tl.program_id(1) * N + tl.arange(0, N)
        m_cols = cols < intermediate_size
        cols = tl.where(m_cols, cols, 0).to(tl.int64)
        p_x = x_ptr + (slot // k) * stride_xt + tl.zeros([1], tl.int64)
        dtype: tl.constexpr = h_ptr.dtype.element_ty
        o_scales = (expert * stride_se + cols * stride_sn)[None, None, :]
        groups = tl.arange(0, G)
        gate = tl.zeros([G, 1, N], tl.float32)
        up = tl.zeros([G, 1, N], tl.float32)
        for first in range(0, num_words, G * W):
            inner = first + _places(G, W)
            m_inner = inner < num_words
            p_words = words_ptr + expert * stride_we + (cols * stride_wn)[None, None, :, None]
            p_words += inner
            b_gate = tl.load(p_words, mask=m_inner, other=0)
            if PARTS == 2:
                b_up = tl.load(p_words + stride_wp, mask=m_inner, other=0)
            x = _columns(p_x, tl.full([1], True, tl.int1), first, num_words, dtype, WAYS, G, W)
            x_sums = _sums_of_columns(x, WAYS)
            begins = first + groups * W
            m_groups = (begins < num_words)[:, None, None]
            o_groups = o_scales + (begins // GROUP if GROUP > 0 else begins * 0)[:, None, None]
            p_zeros = None if zeros_ptr is None else zeros_ptr + o_groups
            sums = _sums(b_gate, x, FORMAT, WAYS)
            gate += _scaled(sums, x_sums, scales_ptr + o_groups, p_zeros, m_groups, FORMAT)
            if PARTS == 2:
                o_groups += stride_sp
                p_zeros = None if zeros_ptr is None else zeros_ptr + o_groups
                sums = _sums(b_up, x, FORMAT, WAYS)
                up += _scaled(sums, x_sums, scales_ptr + o_groups, p_zeros, m_groups, FORMAT)
        gates = tl.sum(tl.sum(gate, 0), 0)
        ups = tl.sum(tl.sum(up, 0), 0)
        if HAS_BIAS:
            p_bias = bias_ptr + expert * stride_be + cols * stride_bn
            gates += tl.load(p_bias).to(tl.float32)
            if PARTS == 2:
                ups += tl.load(p_bias + stride_bp).to(tl.float32)
        if PARTS == 2:
            h = activate_gated(gates, ups, ACTIVATION, LIMIT, UP_OFFSET)
        else:
            h = activate(gates, ACTIVATION)
        p_h = h_ptr + slot * intermediate_size + cols
        tl.store(p_h, h.to(h_ptr.dtype.element_ty), mask=m_cols)


@triton.jit
def _few_tokens_down_weight_only_kernel(
    h_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    num_experts,
    num_words,
    hidden_size,
    stride_ht,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_be,
    stride_bn,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program computes N columns of all the experts of a token."""
    start_next(OVERLAP)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0)
    cols = tl.program_id(1) * N + tl.arange(0, N)
    m_cols = cols < hidden_size
    cols = tl.where(m_cols, cols, 0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    # What chose the experts had finished before the first kernel let this one start.
    experts = tl.load(ids_ptr + token * K + slots, mask=slots < K, other=-1).to(tl.int64)
    weights = tl.load(weights_ptr + token * K + slots, mask=slots < K, other=0.0)
    m_slots = (experts >= 0) & (experts < num_experts)
    experts = tl.where(m_slots, experts, 0)
    p_h = h_ptr + (token * K + slots).to(tl.int64) * stride_ht
    o_words = (experts * stride_we)[:, None] + (cols * stride_wn)[None, :]
    o_scales = ((experts * stride_se)[:, None] + (cols * stride_sn)[None, :])[None, :, :]
    inner = _places(G, W)
    p_words = words_ptr + o_words[None, :, :, None] + inner
    m_rows = m_slots[None, :, None, None]
    ahead = ()
    for i in tl.static_range(PIECES):
        m_words = m_rows & (inner < num_words - i * G * W)
        ahead += (tl.load(p_words + i * G * W, mask=m_words, other=0),)
    wait_for_previous(OVERLAP)
    products = tl.zeros([G, SLOTS, N], tl.float32)
    for i in tl.static_range(PIECES):
        # fmt: off
        products += _down_products(
            ahead[i], i * G * W, p_h, m_slots, o_scales, scales_ptr, zeros_ptr, num_words, dtype,
            FORMAT, WAYS, GROUP, G, W,
        )
        # fmt: on
    for first in range(PIECES * G * W, num_words, G * W):
        m_words = m_rows & (inner < num_words - first)
        words = tl.load(p_words + first, mask=m_words, other=0)
        # fmt: off
        products += _down_products(
            words, first, p_h, m_slots, o_scales, scales_ptr, zeros_ptr, num_words, dtype, FORMAT,
            WAYS, GROUP, G, W,
        )
        # fmt: on
    y = tl.sum(products, 0)
    if HAS_BIAS:
        o_bias = (experts * stride_be)[:, None] + (cols * stride_bn)[None, :]
        y += tl.load(bias_ptr + o_bias, mask=m_slots[:, None], other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    out = tl.sum(tl.where(m_slots[:, None], y * weights[:, None], 0.0), 0)
    p_out = out_ptr + token * hidden_size + cols
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=m_cols)


@triton.jit
def _down_products(
    words,
    first,
    p_h,
    m_slots,
    o_scales,
    scales_ptr,
    zeros_ptr,
    num_words,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
):
    """[G, SLOTS, N] of words [G, SLOTS, N, W], the first of which are those of a row."""
    h = _columns(p_h, m_slots, first, num_words, dtype, WAYS, G, W)
    begins = first + tl.arange(0, G) * W
    mask = m_slots[None, :, None] & (begins < num_words)[:, None, None]
    o_groups = o_scales + (begins // GROUP if GROUP > 0 else begins * 0)[:, None, None]
    p_zeros = None if zeros_ptr is None else zeros_ptr + o_groups
    h_sums = _sums_of_columns(h, WAYS)
    sums = _sums(words, h, FORMAT, WAYS)
    return _scaled(sums, h_sums, scales_ptr + o_groups, p_zeros, mask, FORMAT)


class _Words(NamedTuple):
    """Weights as the kernels take them: words [.., N, K / WAYS] int32 and what belongs to them."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    options: dict[str, Any]


def _words_of_group(w: WeightOnly, ways: int) -> int:
    """Return the number of words that share a scale; 0 for a scale per row."""
    if isinstance(w, Mxfp4):
        return GROUP // ways
    return 0 if w.scales.shape[-1] == 1 else w.group_size // ways


def in_words(w: WeightOnly) -> bool:
    """Whether the kernels can read w: rows of whole words, groups of a power of two of words."""
    ways = WORD * 8 // w.bits
    zeros = w.zeros
    if w.order is not None or w.shape[-1] % ways or w.data.stride(-1) != 1:
        return False
    if (w.data.data_ptr() | gcd(*w.data.stride()[:-1])) % WORD:
        return False
    if w.scales.stride(-1) != 1 and w.scales.shape[-1] > 1:
        return False
    if zeros is not None and zeros.stride() != w.scales.stride():
        return False
    group = _words_of_group(w, ways)
    return group & (group - 1) == 0


def is_faster(w13: WeightOnly, w2: WeightOnly, num_tokens: int, k: int) -> bool:
    """Whether this is faster than the two kernels for many tokens, as measured on an H200.

    Unpacking and multiplying number by number takes longer than reading, so nothing is gained for
    two tokens or large experts.
    """
    few = num_tokens == 1 and k * w2.shape[1] * w2.shape[2] < MANY_WEIGHTS
    return few and in_words(w13) and in_words(w2)


def _words(w: WeightOnly, block: tuple[int, int, int]) -> _Words:
    ways = WORD * 8 // w.bits
    group = _words_of_group(w, ways)
    width = min(group or GROUP_WORDS, GROUP_WORDS)
    words = w.data.view(torch.int32)
    n, block_words, num_warps = block
    options = {
        "FORMAT": FORMATS[type(w)],
        "WAYS": ways,
        "GROUP": group,
        "N": n,
        "G": max(1, min(block_words // width, next_power_of_2(cdiv(words.shape[-1], width)))),
        "W": width,
        "num_warps": num_warps,
        **launch_options(words.device),
    }
    return _Words(words, w.scales, w.zeros, options)


def _in_quads(x: Tensor) -> Tensor:
    """View x [T, K] as [T, K / 4] int64."""
    x = x.contiguous()
    return (x.clone() if x.data_ptr() % 8 else x).view(torch.int64)


def few_tokens_weight_only(
    x: Tensor,
    w13: WeightOnly,
    w2: WeightOnly,
    *,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str | Gating = "silu",
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """Return the output of a layer's experts for x [T, H] in bf16 or fp16: [T, H] in x's dtype.

    topk_weights is [T, K] fp32, topk_ids [T, K] int32 or int64. w13 [E, 2, I, H] or [E, 1, I, H]
    and w2 [E, H, I] for which `in_words` holds, bias13 [E, 2 or 1, I], bias2 [E, H]. An id outside
    0..E-1 contributes nothing.

    Raises ValueError for shapes that do not fit, and for weights that are not in words.
    """
    gating = Gating.of(activation)
    if w13.data.ndim != 4 or w13.shape[1] not in (1, 2):
        raise ValueError(f"w13 must be [E, 2 or 1, I, H], got {list(w13.shape)}")
    num_experts, num_parts, intermediate_size, hidden_size = w13.shape
    check_shapes(x, w13.shape, w2.shape, topk_weights, topk_ids)
    if x.dtype.itemsize != 2:
        raise ValueError(f"x must be bfloat16 or float16, got {x.dtype}")
    for name, w in (("w13", w13), ("w2", w2)):
        if not in_words(w):
            raise ValueError(f"rows of {name} are not of whole words of 4 bytes, see in_words")
    num_tokens, k = topk_ids.shape
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    h = torch.empty(num_tokens * k, intermediate_size, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if topk_ids.numel() == 0:
        return out.zero_()
    up, down = _words(w13, UP_BLOCK), _words(w2, DOWN_BLOCK)
    grid = num_tokens * k, cdiv(intermediate_size, up.options["N"])
    _few_tokens_gated_up_weight_only_kernel[grid](
        _in_quads(x),
        up.words,
        up.scales,
        up.zeros,
        bias13,
        topk_ids,
        h,
        num_experts,
        up.words.shape[-1],
        intermediate_size,
        k,
        hidden_size // QUAD,
        *up.words.stride()[:-1],
        *up.scales.stride()[:-1],
        *((0, 0, 0) if bias13 is None else bias13.stride()),
        PARTS=num_parts,
        ACTIVATION=ACTIVATIONS[gating.activation].__name__,
        LIMIT=gating.limit,
        UP_OFFSET=gating.up_offset,
        HAS_BIAS=bias13 is not None,
        **up.options,
    )
    blocks = cdiv(down.words.shape[-1], down.options["G"] * down.options["W"])
    _few_tokens_down_weight_only_kernel[(num_tokens, cdiv(hidden_size, down.options["N"]))](
        _in_quads(h),
        down.words,
        down.scales,
        down.zeros,
        bias2,
        topk_ids,
        topk_weights,
        out,
        num_experts,
        down.words.shape[-1],
        hidden_size,
        intermediate_size // QUAD,
        *down.words.stride()[:-1],
        *down.scales.stride()[:-1],
        *((0, 0) if bias2 is None else bias2.stride()),
        K=k,
        HAS_BIAS=bias2 is not None,
        SLOTS=next_power_of_2(k),
        PIECES=min(PIECES, blocks),
        **down.options,
    )
    return out

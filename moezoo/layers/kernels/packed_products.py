"""The products of `gated_up_weight_only` and `down_weight_only`: packed weights times rows, a tile.

Weights are the first operand, unpacked from shared memory to the registers that the matrix units
read. They are multiplied as the small numbers they are stored as, which 16 bits hold exactly, and
the sums over a group of columns are scaled in fp32. mxfp4's groups are too small for that, and its
scales are powers of two: there weights are scaled first, exactly. With many rows weights are scaled
first in all formats with groups, and rounded then.

Legend: R rows of weights, of both gate and up where there are both; W words of a row, see `unpack`.
"""

import triton
import triton.language as tl

from moezoo.layers.kernels.unpack import (
    CHUNK,
    E2M1_SHIFT,
    factors,
    no_zero_points,
    unpack,
    zero_points,
)


def num_slices(block_words: int, group: int, *, mxfp4: bool, zeros: bool, chain: bool) -> int:
    """Into how many a block of words is cut: one for each group, or two.

    Uncut, words with zero points or scales of their row would go through shared memory once more.
    And of a chain with one product a block Triton 3.6 makes several that the next block does not
    wait for: ptxas, where registers are few, then unpacks into those that the matrix units still
    read (seen with mxfp4 and 256 rows: errors of 3e-2, or inf).
    """
    cuts = 2 if (zeros or chain) and block_words > CHUNK.value else 1
    return max(cuts, block_words // group if group and not mxfp4 else 1)


@triton.jit
def _slices(words, SLICES: tl.constexpr):
    """words [R, W] -> SLICES tensors [R, W / SLICES]"""
    if SLICES == 1:
        return (words,)
    else:
        R: tl.constexpr = words.shape[0]
        W: tl.constexpr = words.shape[1]
        first, second = tl.split(tl.permute(tl.reshape(words, [R, 2, W // 2]), [0, 2, 1]))
        return _slices(first, SLICES // 2) + _slices(second, SLICES // 2)


@triton.jit
def _spread(per_group, W: tl.constexpr):
    """[R, G] -> [R, W], each W / G times"""
    R: tl.constexpr = per_group.shape[0]
    G: tl.constexpr = per_group.shape[1]
    if G == W:
        return per_group
    elif G == 1:
        return tl.broadcast_to(per_group, [R, W])
    else:
        wide = tl.broadcast_to(per_group[:, :, None], [R, G, W // G])
        return tl.reshape(wide, [R, W])


@triton.jit
def in_turns(parts, PARTS: tl.constexpr):
    """[PARTS, N, W] -> [PARTS * N, W]: eight rows of gate, then the same of up. A thread's rows of
    a product are eight apart, so it has both."""
    N: tl.constexpr = parts.shape[1]
    W: tl.constexpr = parts.shape[2]
    if PARTS == 1:
        return tl.reshape(parts, [N, W])
    else:
        eights = tl.permute(tl.reshape(parts, [2, N // 8, 8, W]), [1, 0, 2, 3])
        return tl.reshape(eights, [2 * N, W])


@triton.jit
def out_of_turns(rows):
    """[2 * N, M] -> [N, M] of gate and of up"""
    N: tl.constexpr = rows.shape[0] // 2
    M: tl.constexpr = rows.shape[1]
    eights = tl.permute(tl.reshape(rows, [N // 8, 2, 8, M]), [0, 2, 3, 1])
    gate, up = tl.split(eights)
    return tl.reshape(gate, [N, M]), tl.reshape(up, [N, M])


@triton.jit
def _row_slices(
    rows,
    p_x,
    first_row,
    start,
    m_rows,
    across,
    width,
    WAYS: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE_W: tl.constexpr,
    ROWS_DESCRIBED: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The columns that the words from `start` on meet: SLICES tensors [BLOCK_M, WAYS * SLICE_W]"""
    xs = ()
    for s in tl.static_range(SLICES):
        first = WAYS * (start + s * SLICE_W)
        if ROWS_DESCRIBED:
            xs += (rows.load([first_row, first]),)
        else:
            m_x = m_rows[:, None]
            if not EVEN_K:
                m_x = m_x & (first + across < width)[None, :]
            xs += (tl.load(p_x + first, mask=m_x, other=0.0),)
    return xs


@triton.jit
def _block_factors(
    scales_ptr,
    o_scales,
    first,
    num_groups,
    GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    dtype: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """mxfp4's `factors` [R, GROUPS] of the groups from `first` on."""
    groups = first + tl.arange(0, GROUPS)
    p_group = scales_ptr + (o_scales[:, None] + groups[None, :])
    if EVEN_K:
        scales = tl.load(p_group)
    else:
        scales = tl.load(p_group, mask=(groups < num_groups)[None, :], other=0)
    return factors(scales, dtype, PAIRS)


@triton.jit
def products(
    expert,
    first_col,
    num_cols,
    first_row,
    rows,
    p_rows,
    m_rows,
    w,
    scales_ptr,
    zeros_ptr,
    num_words,
    stride_we,
    stride_wp,
    stride_wn,
    stride_se,
    stride_sp,
    stride_sn,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES_ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    CHAIN: tl.constexpr,
    SCALES_AT_ONCE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS_DESCRIBED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """-> [PARTS * BLOCK_N, BLOCK_M] fp32: columns of an expert's gate and up `in_turns` by rows.

    Rows are as `interleave` makes them: p_rows [BLOCK_M] is where each begins, or, if
    ROWS_DESCRIBED, `rows` a descriptor of them, whose loads may go on past the expert's last. GROUP
    words have a scale, or with GROUP 0 all of a column; strides of scales are multiples of
    SCALES_ALIGNED. SLICES is what `num_slices` says.

    With CHAIN the matrix units go on adding, and weights are scaled first, in dtype: for many rows,
    whose sums leave no registers for those of a group. SCALES_AT_ONCE reads mxfp4's scales of a
    block in one go, in more registers.
    """
    R: tl.constexpr = PARTS * BLOCK_N
    SCALED: tl.constexpr = FORMAT == "mxfp4"
    GROUPS: tl.constexpr = max(1, BLOCK_W // GROUP) if GROUP > 0 else 1
    SLICE_W: tl.constexpr = BLOCK_W // SLICES
    SLICE_GROUPS: tl.constexpr = max(1, GROUPS // SLICES)
    # Measured: int8 with many rows was faster so, 4 bits slower.
    ROWS_FIRST: tl.constexpr = CHAIN and FORMAT == "int8"
    turns = tl.arange(0, R)
    if PARTS == 1:
        part = turns * 0
        cols = first_col + turns
    else:
        part = turns // 8 % 2
        cols = first_col + turns // 16 * 8 + turns % 8
    m_cols = cols < num_cols
    num_groups = num_words // GROUP if GROUP > 0 else 1
    # Columns past the end read column 0, and are not stored; rows past the end are zero.
    w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
    # The compiler then knows it too.
    stride_se = stride_se // SCALES_ALIGNED * SCALES_ALIGNED
    stride_sp = stride_sp // SCALES_ALIGNED * SCALES_ALIGNED
    stride_sn = stride_sn // SCALES_ALIGNED * SCALES_ALIGNED
    o_scales = expert.to(tl.int64) * stride_se + part * stride_sp + w_cols * stride_sn
    inner = tl.arange(0, BLOCK_W)
    if not DESCRIPTORS:
        o_w = expert.to(tl.int64) * stride_we + part * stride_wp + w_cols * stride_wn
        p_w = w + o_w[:, None] + inner[None, :]
    width = tl.cdiv(num_words, CHUNK) * (CHUNK * WAYS)
    across = tl.arange(0, WAYS * SLICE_W)
    p_x = None if ROWS_DESCRIBED else p_rows[:, None] + across[None, :]

    total = tl.zeros([R, BLOCK_M], tl.float32)
    scales = ()
    zeros = ()
    if not SCALED:
        for s in tl.static_range(GROUPS):
            m_group = m_cols & (s < num_groups)
            scales += (tl.load(scales_ptr + (o_scales + s), mask=m_group, other=0.0),)
            if HAS_ZEROS:
                zeros += (tl.load(zeros_ptr + (o_scales + s), mask=m_group, other=0),)
    for start in range(0, num_words, BLOCK_W):
        # Weights first, since the addresses of rows arrive later; but see ROWS_FIRST.
        if ROWS_FIRST:
            # fmt: off
            xs = _row_slices(
                rows, p_x, first_row, start, m_rows, across, width, WAYS, SLICES, SLICE_W,
                ROWS_DESCRIBED, EVEN_K,
            )
            # fmt: on
        if DESCRIPTORS:
            parts = tl.reshape(w.load([expert, 0, first_col, start]), [PARTS, BLOCK_N, BLOCK_W])
            words = in_turns(parts, PARTS)
        elif EVEN_K:
            words = tl.load(p_w + start)
        else:
            words = tl.load(p_w + start, mask=(start + inner < num_words)[None, :], other=0)
        if not ROWS_FIRST:
            # fmt: off
            xs = _row_slices(
                rows, p_x, first_row, start, m_rows, across, width, WAYS, SLICES, SLICE_W,
                ROWS_DESCRIBED, EVEN_K,
            )
            # fmt: on
        next_scales = ()
        next_zeros = ()
        if GROUP > 0 and not SCALED:
            # What the next block needs is asked for before this one is worked on.
            for s in tl.static_range(GROUPS):
                group = (start + BLOCK_W) // GROUP + s
                m_group = m_cols & (group < num_groups)
                next_scales += (tl.load(scales_ptr + (o_scales + group), mask=m_group, other=0.0),)
                if HAS_ZEROS:
                    next_zeros += (tl.load(zeros_ptr + (o_scales + group), mask=m_group, other=0),)
        slices = _slices(words, SLICES)
        if SCALED and SCALES_AT_ONCE:
            # fmt: off
            all_factors = _block_factors(
                scales_ptr, o_scales, start // GROUP, num_groups, GROUPS, EVEN_K, dtype, PAIRS,
            )
            # fmt: on
            slices_factors = _slices(all_factors, SLICES)
        for s in tl.static_range(SLICES):
            factor = 1.0
            if SCALED:
                if SCALES_AT_ONCE:
                    factor = slices_factors[s]
                else:
                    first_group = start // GROUP + s * SLICE_GROUPS
                    # fmt: off
                    factor = _block_factors(
                        scales_ptr, o_scales, first_group, num_groups, SLICE_GROUPS, EVEN_K, dtype,
                        PAIRS,
                    )
                    # fmt: on
                factor = _spread(factor, SLICE_W)
            if HAS_ZEROS:
                zero = zero_points(zeros[s * GROUPS // SLICES], FORMAT, dtype, PAIRS)
                zero = tl.broadcast_to(zero[:, None], [R, SLICE_W])
            else:
                zero = no_zero_points([R, SLICE_W], dtype, PAIRS)
            if CHAIN and GROUP > 0 and not SCALED:
                factor = scales[s * GROUPS // SLICES].to(dtype if PAIRS else tl.float32)
                factor = tl.broadcast_to(factor[:, None], [R, SLICE_W])
            # fmt: off
            b_w = unpack(
                slices[s], zero, factor, FORMAT, WAYS, HAS_ZEROS, SCALED or (CHAIN and GROUP > 0),
                dtype, PAIRS,
            )
            # fmt: on
            if CHAIN:
                total = tl.dot(b_w, xs[s].T, total, input_precision="ieee")
            else:
                # A sum that went on in the matrix units would be waited for every 16 columns.
                product = tl.dot(b_w, xs[s].T, input_precision="ieee")
                if SCALED:
                    total += product * (2.0**E2M1_SHIFT if PAIRS and dtype == tl.bfloat16 else 1.0)
                else:
                    total += product * scales[s * GROUPS // SLICES].to(tl.float32)[:, None]
        if GROUP > 0 and not SCALED:
            scales = next_scales
            zeros = next_zeros
    if CHAIN:
        if GROUP == 0:
            total *= scales[0].to(tl.float32)[:, None]
        elif SCALED and PAIRS and dtype == tl.bfloat16:
            total *= 2.0**E2M1_SHIFT
    return total

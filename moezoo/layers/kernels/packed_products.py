"""The products inside `weight_only`: a tile of packed weights by a tile of rows.

Weights are the first operand, unpacked from shared memory to the registers that the matrix units
read. They are multiplied as the small numbers they are stored as, which 16 bits hold exactly, and
the sums over a group of columns are scaled in fp32: fewer scalings than of weights as long as a
program has no more than 128 rows. Where groups are too small for that, in mxfp4, scales are powers
of two, and weights are scaled first, exactly.

Legend: N columns of the result, one for each row of weights; W words of weights, see `unpack`.
"""

import triton
import triton.language as tl

from moezoo.layers.kernels.unpack import CHUNK, E2M1_SHIFT, factors, unpack, zero_points


@triton.jit
def _slices(words, SLICES: tl.constexpr):
    """words [N, W] -> SLICES tensors [N, W / SLICES]"""
    if SLICES == 1:
        return (words,)
    else:
        N: tl.constexpr = words.shape[0]
        W: tl.constexpr = words.shape[1]
        first, second = tl.split(tl.permute(tl.reshape(words, [N, 2, W // 2]), [0, 2, 1]))
        return _slices(first, SLICES // 2) + _slices(second, SLICES // 2)


@triton.jit
def _spread(per_group, W: tl.constexpr):
    """[N, G] -> [N, W], each W / G times"""
    N: tl.constexpr = per_group.shape[0]
    G: tl.constexpr = per_group.shape[1]
    if G == W:
        return per_group
    elif G == 1:
        return tl.broadcast_to(per_group, [N, W])
    else:
        wide = tl.broadcast_to(per_group[:, :, None], [N, G, W // G])
        return tl.reshape(wide, [N, W])


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
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    WAYS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES_ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS_DESCRIBED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """-> PARTS products [BLOCK_N, BLOCK_M] fp32: columns of an expert's weights by rows.

    Rows are as `interleave` makes them: p_rows [BLOCK_M] is where each begins, or, if
    ROWS_DESCRIBED, `rows` a descriptor of them, whose loads may go on past the expert's last. GROUP words have a scale, or
    with GROUP 0 all of a column; strides of scales are multiples of SCALES_ALIGNED.
    """
    SCALED: tl.constexpr = FORMAT == "mxfp4"
    SLICES: tl.constexpr = BLOCK_W // GROUP if GROUP > 0 and GROUP < BLOCK_W and not SCALED else 1
    SLICE_W: tl.constexpr = BLOCK_W // SLICES
    HIDDEN_SHIFT: tl.constexpr = PAIRS and DTYPE == tl.bfloat16
    GROUPS: tl.constexpr = max(1, BLOCK_W // GROUP) if SCALED else 1
    cols = first_col + tl.arange(0, BLOCK_N)
    m_cols = cols < num_cols
    num_groups = num_words // GROUP if GROUP > 0 else 1
    # Columns past the end read column 0, and are not stored; rows past the end are zero.
    w_cols = tl.where(m_cols, cols, 0).to(tl.int64)
    # The compiler then knows it too.
    stride_se = stride_se // SCALES_ALIGNED * SCALES_ALIGNED
    stride_sp = stride_sp // SCALES_ALIGNED * SCALES_ALIGNED
    stride_sn = stride_sn // SCALES_ALIGNED * SCALES_ALIGNED
    o_scales = expert.to(tl.int64) * stride_se + w_cols * stride_sn
    inner = tl.arange(0, BLOCK_W)
    if not DESCRIPTORS:
        o_w = expert.to(tl.int64) * stride_we + w_cols * stride_wn
        p_w = w + o_w[:, None] + inner[None, :]
    width = tl.cdiv(num_words, CHUNK) * (CHUNK * WAYS)
    across = tl.arange(0, WAYS * SLICE_W)
    if not ROWS_DESCRIBED:
        p_x = p_rows[:, None] + across[None, :]

    totals = ()
    scales = ()
    zeros = ()
    for part in tl.static_range(PARTS):
        totals += (tl.zeros([BLOCK_N, BLOCK_M], tl.float32),)
        if not SCALED:
            for s in tl.static_range(SLICES):
                o_group = o_scales + part * stride_sp + s
                m_group = m_cols & (s < num_groups)
                scales += (tl.load(scales_ptr + o_group, mask=m_group, other=0.0),)
                if HAS_ZEROS:
                    zeros += (tl.load(zeros_ptr + o_group, mask=m_group, other=0),)
    for start in range(0, num_words, BLOCK_W):
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
        next_totals = ()
        next_scales = ()
        next_zeros = ()
        for part in tl.static_range(PARTS):
            if DESCRIPTORS:
                words = tl.reshape(w.load([expert, part, first_col, start]), [BLOCK_N, BLOCK_W])
            else:
                p_words = p_w + (part * stride_wp + start)
                if EVEN_K:
                    words = tl.load(p_words)
                else:
                    words = tl.load(p_words, mask=(start + inner < num_words)[None, :], other=0)
            if GROUP > 0 and not SCALED:
                # What the next block needs is asked for before this one is worked on.
                for s in tl.static_range(SLICES):
                    group = (start + BLOCK_W) // GROUP + s
                    o_group = o_scales + part * stride_sp + group
                    m_group = m_cols & (group < num_groups)
                    next_scales += (tl.load(scales_ptr + o_group, mask=m_group, other=0.0),)
                    if HAS_ZEROS:
                        next_zeros += (tl.load(zeros_ptr + o_group, mask=m_group, other=0),)
            total = totals[part]
            slices = _slices(words, SLICES)
            for s in tl.static_range(SLICES):
                factor = 1.0
                if HAS_ZEROS:
                    zero = zero_points(zeros[part * SLICES + s], FORMAT, DTYPE, PAIRS)
                    zero = tl.broadcast_to(zero[:, None], [BLOCK_N, SLICE_W])
                else:
                    zero = tl.full([BLOCK_N, SLICE_W], 8, tl.uint8)
                    zero = zero_points(zero, FORMAT, DTYPE, PAIRS)
                if SCALED:
                    groups = start // GROUP + tl.arange(0, GROUPS)
                    p_group = scales_ptr + (o_scales[:, None] + (part * stride_sp + groups)[None, :])
                    if EVEN_K:
                        factor = tl.load(p_group)
                    else:
                        factor = tl.load(p_group, mask=(groups < num_groups)[None, :], other=0)
                    factor = _spread(factors(factor, DTYPE, PAIRS), BLOCK_W)
                b_w = unpack(slices[s], zero, factor, FORMAT, WAYS, SCALED, DTYPE, PAIRS)
                # A sum that went on in the matrix units would be waited for every 16 columns.
                product = tl.dot(b_w, xs[s].T, input_precision="ieee")
                if SCALED:
                    total += product * (2.0**E2M1_SHIFT if HIDDEN_SHIFT else 1.0)
                else:
                    total += product * scales[part * SLICES + s].to(tl.float32)[:, None]
            next_totals += (total,)
        totals = next_totals
        if GROUP > 0 and not SCALED:
            scales = next_scales
            zeros = next_zeros
    return totals

"""decode_attention: softmax attention of one new token a sequence over a paged cache.

    scores[b, h, s] = scale * sum over d of q[b, h, d] * keys[slot(b, s), h // (Hq / Hk), d]
    out[b, h]       = sum over s of softmax(scores)[b, h, s] * values[slot(b, s), h // (Hq / Hk)]
    slot(b, s)      = page_table[b, s // page_size] * page_size + s % page_size

Of every sequence the newest `window` of its `lengths[b]` keys are seen, or the last chunk of them
if that is `Chunked`. A program takes the heads that share a key head, or some of them, over a share
of the keys; where there are several shares, their sums go through memory and a second kernel adds
them up. Wide keys that hold the values too are read in parts. The launch does not depend on
`lengths`, so it can be captured in a CUDA graph.

Scores, softmax and sums are fp32; its numerators are rounded to the cache's dtype before they
multiply values, but not in the sum that divides them. The output is rounded once. What a sequence
gets does not depend on the others, but on how many there are and on the width of the page table:
they decide the number of shares, and with it the order of the sums.

Legend: B sequences, Hq query heads, Hk key heads, D key width, Dv value width, S slots of the
cache, P pages a sequence may have.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.attention_operands import require_operands
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2
from moezoo.layers.kernels.tiles import multiprocessors, shared_memory
from moezoo.layers.kernels.windows import Chunked, first_key

LOG2E = math.log2(math.e)
MAX_SPLITS = 128
"""Most shares of a sequence's keys: the merge holds a column of every share's sums in registers."""


def decode_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    *,
    page_size: int,
    scale: float,
    value_dim: int | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    if values is None:
        values = keys[..., :value_dim]
    num_key_heads = keys.shape[1]
    out = q.new_zeros(*q.shape[:2], values.shape[2])
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        first = 0 if window is None else max(first_key(length - 1, window), 0)
        seen = torch.arange(first, length, device=q.device)
        slots = page_table[b, seen // page_size].long() * page_size + seen % page_size
        rows = q[b].float().unflatten(0, (num_key_heads, -1))  # [Hk, Hq / Hk, D]
        scores = scale * rows @ keys[slots].float().permute(1, 2, 0)  # [Hk, Hq / Hk, seen]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            sink = sinks.float().view(num_key_heads, -1, 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., : len(seen)]
        out[b] = (weights @ values[slots].float().transpose(0, 1)).flatten(0, 1).to(q.dtype)
    return out


@dataclass(frozen=True)
class Plan:
    """How the work is divided among programs.

    A program takes `block_heads` heads over one of `num_splits` shares of the keys, `block_keys`
    at a time. Keys whose first numbers are the values are read and multiplied in `num_parts` parts.
    """

    block_heads: int
    block_keys: int
    num_splits: int
    num_warps: int
    num_stages: int
    num_parts: int


def plan(
    q: Tensor,
    keys: Tensor,
    *,
    key_widths: tuple[int, int],
    value_width: int,
    page_size: int,
    max_keys: int,
) -> Plan:
    """Return the plan for q [B, Hq, D] and keys [S, Hk, D] if queries see at most `max_keys`.

    The widths are those of a key's row, in its two parts, and of a value's row in shared memory.
    """
    key_width = sum(key_widths)
    batch, num_heads, _ = q.shape
    num_key_heads = keys.shape[1]
    groups = num_heads // num_key_heads
    shared, itemsize = shared_memory(q.device), q.element_size()
    # Hopper's matrix instructions take 64 rows; with fewer heads, two programs a multiprocessor.
    many = groups > 32 and itemsize == 2 and shared > 200 * 1024
    block_heads, per_sm = (64, 1) if many else (16, 2)
    row_bytes = (key_width + value_width) * itemsize
    block_keys = min(page_size, 64)
    while block_keys > 16 and block_keys * row_bytes > 36 * 1024:
        block_keys //= 2
    room = shared // per_sm - 4096 - block_heads * key_width * itemsize
    buffers = max(1, min(4, room // (block_keys * row_bytes)))
    programs = batch * num_key_heads * cdiv(groups, block_heads)
    num_splits = per_sm * multiprocessors(q.device) // programs  # that run at once
    if per_sm == 2 and (programs > 16 or (value_width == 0 and programs > 4)):
        # Half of them: one a multiprocessor. Measured on an H100 with a page table of 16384
        # keys, us with all of them and with half, at lengths of 512, 2048 and 8192:
        #     32 programs (Qwen3-MoE, B 8)   9.1 and 7.7, 19.8 and 18.0, 55.8 and 53.9
        #     128 programs (its B 32)        19.7 and 16.3, 55.7 and 51.9, 188.4 and 185.6
        #     128 programs (OLMoE, B 8)      17.3 and 15.3, 52.4 and 49.9
        # With fewer programs half was better once in three lengths: 16 (OLMoE, B 1) took 30.2 and
        # 29.6 at 8192, 4 (Qwen3-MoE, B 1) 7.3 and 6.4 at 2048. Sums of latents are wide: 8 programs
        # (DeepSeek-V2-Lite, B 8) took 40.2 and 38.6 at 8192.
        num_splits //= 2  # not one more, which would give some multiprocessors two
    # A share of a single block where that makes few programs: 4 (Qwen3-MoE, B 1) of a step at 512
    # tokens took 2,909 us, and 2,940 with two blocks; 16 (OLMoE, B 1) 1,144 and 1,137.
    num_splits = min(num_splits, max_keys // (block_keys if programs <= 8 else 2 * block_keys))
    num_splits = max(1, min(num_splits, MAX_SPLITS))
    # What a share never fills only keeps the next kernel's programs out: a share of one block took
    # 4.9 us with four stages, 4.6 with two (Qwen3-MoE, B 1).
    blocks = cdiv(max_keys, block_keys * num_splits)
    # A product over 576 columns is a chain of 36 matrix instructions in each warp. In four chains
    # one row of 512 tokens took 5.7 us instead of 6.2, one of 8192 9.9 and 10.9, 8 of 2048 15.7
    # and 16.4, 32 of 8192 115.3 and 116.6 (DeepSeek-V2-Lite).
    parts = 4 if value_width == 0 and key_widths[0] >= 512 and not many else 1
    return Plan(
        block_heads=block_heads,
        block_keys=block_keys,
        num_splits=num_splits,
        num_warps=8 if many or itemsize == 4 else 4,
        num_stages=max(2, min(buffers if many else buffers + 1, blocks + 1)),
        num_parts=parts,
    )


@triton.jit
def _shares(length, window, num_splits, CHUNKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key seen, the block of BLOCK_N keys it is in, and how many blocks a share has."""
    last = tl.maximum(length - 1, 0)
    first_seen = last // window * window if CHUNKED else tl.maximum(length - window, 0)
    first_block = first_seen // BLOCK_N
    return first_seen, first_block, tl.cdiv(tl.cdiv(length, BLOCK_N) - first_block, num_splits)


@triton.jit(do_not_specialize=["window", "num_splits"])
def _decode_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    page_table_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    normalizers_ptr,
    window,
    num_splits,
    scale,
    softcap,
    stride_qb,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    stride_pb,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNKED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    head_blocks: tl.constexpr = (GROUPS + BLOCK_H - 1) // BLOCK_H
    key_head = tl.program_id(0) // head_blocks
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    # What `latent_store` or `rotate_and_store` waited for has ended: the lengths of this step.
    length = tl.load(lengths_ptr + row)
    first_seen, first_block, num_blocks = _shares(length, window, num_splits, CHUNKED, BLOCK_N)
    begin = first_block + split * num_blocks
    end = tl.minimum(begin + num_blocks, tl.cdiv(length, BLOCK_N))
    # One block ahead: pages read where they are used would take every other pipeline stage.
    p_pages = page_table_ptr + row * stride_pb
    page = tl.load(p_pages + begin * BLOCK_N // PAGE_SIZE, mask=begin < end, other=0)
    wait(OVERLAP)
    if (begin < end) | (not SPLIT):
        groups = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        m_heads = groups < GROUPS
        heads = key_head * GROUPS + groups
        tokens = tl.arange(0, BLOCK_N)
        # Values that are a part of the keys: the keys in two parts, this one and the rest.
        FIRST_DIM: tl.constexpr = VALUE_DIM if SHARED else DIM
        cols = tl.arange(0, BLOCK_D)
        p_q = q_ptr + row * stride_qb + heads[:, None] * stride_qh
        qs = ()
        for p in tl.static_range(PARTS):
            part = (p * BLOCK_D + cols)[None, :]
            qs += (tl.load(p_q + part, mask=m_heads[:, None] & (part < FIRST_DIM), other=0.0),)
        o_keys = tokens[:, None] * stride_ks + cols[None, :]
        if BLOCK_REST:
            rest = FIRST_DIM + tl.arange(0, BLOCK_REST)
            m_rest = rest < DIM
            m_q = m_heads[:, None] & m_rest[None, :]
            b_q_rest = tl.load(p_q + rest[None, :], mask=m_q, other=0.0)
            o_rest = tokens[:, None] * stride_ks + rest[None, :]
        value_cols = tl.arange(0, BLOCK_V)
        m_value_cols = value_cols < VALUE_DIM
        o_values = tokens[:, None] * stride_vs + value_cols[None, :]

        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        if HAS_SINKS:
            # The first share starts with the sink as if it were a key of value 0.
            m_sinks = m_heads & (split == 0)
            sinks = tl.load(sinks_ptr + heads, mask=m_sinks, other=float("-inf"))
            top = sinks.to(tl.float32) * 1.4426950408889634  # LOG2E
            total += tl.where(split == 0, 1.0, 0.0)
        sums = ()
        for _ in tl.static_range(PARTS):
            sums += (tl.zeros([BLOCK_H, BLOCK_V], tl.float32),)
        for block in range(begin, end):
            start = block * BLOCK_N
            positions = start + tokens
            m_tokens = (positions >= first_seen) & (positions < length)
            slot = page.to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE
            page = tl.load(p_pages + (start + BLOCK_N) // PAGE_SIZE, mask=block + 1 < end, other=0)
            p_keys = keys_ptr + (slot * stride_ks + key_head * stride_kh)
            ks = ()
            for p in tl.static_range(PARTS):
                m_k = m_tokens[:, None] & (p * BLOCK_D + cols < FIRST_DIM)[None, :]
                ks += (tl.load(p_keys + o_keys + p * BLOCK_D, mask=m_k, other=0.0),)
            scores = tl.dot(qs[0], tl.trans(ks[0]), input_precision="ieee")
            for p in tl.static_range(1, PARTS):
                scores += tl.dot(qs[p], tl.trans(ks[p]), input_precision="ieee")
            if BLOCK_REST:
                m_k = m_tokens[:, None] & m_rest[None, :]
                b_rest = tl.load(p_keys + o_rest, mask=m_k, other=0.0)
                scores += tl.dot(b_q_rest, tl.trans(b_rest), input_precision="ieee")
            if HAS_SOFTCAP:
                # softcap * tanh(scores / softcap); `scale` and `softcap` come multiplied so.
                scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * scale) + 1.0))
            else:
                scores *= scale
            scores = tl.where(m_tokens[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            top = new_top
            if SHARED:
                vs = ks
            else:
                p_values = values_ptr + (slot * stride_vs + key_head * stride_vh)
                m_v = m_tokens[:, None] & m_value_cols[None, :]
                vs = (tl.load(p_values + o_values, mask=m_v, other=0.0),)
            weights = weights.to(vs[0].dtype)
            new_sums = ()
            for p in tl.static_range(PARTS):
                acc = sums[p] * shrink[:, None]
                new_sums += (tl.dot(weights, vs[p], acc, input_precision="ieee"),)
            sums = new_sums

        num_heads = tl.num_programs(0) // head_blocks * GROUPS
        row_heads = row * num_heads + heads
        slots = row_heads
        if SPLIT:
            slots = row_heads * num_splits + split
            p_normalizers = normalizers_ptr + slots * 2
            tl.store(p_normalizers, top, mask=m_heads)
            tl.store(p_normalizers + 1, total, mask=m_heads)
        for p in tl.static_range(PARTS):
            acc = sums[p]
            if not SPLIT:
                # An unused row has sums of 0 and, without sinks, total 0.
                acc /= tl.where(total > 0.0, total, 1.0)[:, None]
            out_cols = (p * BLOCK_V + value_cols)[None, :]
            m_out = m_heads[:, None] & (out_cols < VALUE_DIM)
            p_out = out_ptr + slots[:, None] * VALUE_DIM + out_cols
            tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["window", "num_splits"])
def _merge_kernel(
    partial_ptr,
    normalizers_ptr,
    lengths_ptr,
    out_ptr,
    window,
    num_splits,
    VALUE_DIM: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    wait(OVERLAP)
    _, first_block, num_blocks = _shares(length, window, num_splits, CHUNKED, BLOCK_N)
    splits = tl.arange(0, BLOCK_SPLITS)
    # Nobody wrote the shares without blocks.
    m_splits = splits * num_blocks < tl.cdiv(length, BLOCK_N) - first_block
    row_head = row * tl.num_programs(1) + tl.program_id(1)
    slots = row_head * num_splits + splits
    tops = tl.load(normalizers_ptr + slots * 2, mask=m_splits, other=float("-inf"))
    totals = tl.load(normalizers_ptr + slots * 2 + 1, mask=m_splits, other=0.0)
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_cols = cols < VALUE_DIM
    p_partial = partial_ptr + slots[:, None] * VALUE_DIM + cols[None, :]
    b_partial = tl.load(p_partial, mask=m_splits[:, None] & m_cols[None, :], other=0.0)
    weights = tl.where(m_splits, tl.exp2(tops - tl.max(tops, 0)), 0.0)
    total = tl.sum(weights * totals, 0)
    out = tl.sum(weights[:, None] * b_partial, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row_head * VALUE_DIM + cols, out.to(out_ptr.dtype.element_ty), mask=m_cols)


def _block_width(width: int) -> int:
    return max(16, next_power_of_2(width))


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    *,
    page_size: int,
    scale: float,
    value_dim: int | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the attention of queries q [B, Hq, D]: [B, Hq, Dv], contiguous, in q's dtype.

    keys [S, Hk, D] and values [S, Hk, Dv] of q's dtype; without values they are the first
    `value_dim` numbers of each key, as in MLA. page_table [B, P] and lengths [B] int32: the keys
    that a query sees, its own included; 0 gives a row of zeros. The last stride of q, keys, values
    and page_table is 1. `sinks` [Hq] of any float dtype are one more score a head, of a key
    without a value. `softcap` makes scores softcap * tanh(scores / softcap).

    Entries of the page table past a sequence's pages, and slots past its keys, are not read, nor
    are pages wholly outside the window. page_table and lengths are read before the wait, for which
    see `overlap`: the kernels just before, as far as they may still run then, do not write them.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    require_operands(
        *(q, keys, values, page_table),
        rows="B",
        page_size=page_size,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
    batch, num_heads, dim = q.shape
    num_key_heads = keys.shape[1]
    if (values is None) == (value_dim is None):
        raise ValueError("one of values and value_dim must be given, not both")
    if values is not None:
        value_width = values.shape[2]
    elif 0 < value_dim <= dim:
        value_width = value_dim
    else:
        raise ValueError(f"value_dim must be in 1..{dim}, got {value_dim}")
    if page_table.ndim != 2 or len(page_table) != batch or lengths.shape != (batch,):
        raise ValueError(
            f"page_table must be [{batch}, P] and lengths [{batch}], "
            f"got {list(page_table.shape)} and {list(lengths.shape)}"
        )
    if not lengths.is_contiguous():
        raise ValueError(f"lengths must be contiguous, got strides {lengths.stride()}")
    if page_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(
            f"page_table and lengths must be int32, got {page_table.dtype} and {lengths.dtype}"
        )
    out = torch.empty(batch, num_heads, value_width, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    max_keys = page_table.shape[1] * page_size
    chunked = isinstance(window, Chunked)
    window = max_keys if window is None else int(window)
    first = value_width if values is None else dim
    block_d, block_v = _block_width(first), _block_width(value_width)
    block_rest = _block_width(dim - first) if dim > first else 0
    p = plan(
        q,
        keys,
        key_widths=(block_d, block_rest),
        value_width=0 if values is None else block_v,
        page_size=page_size,
        max_keys=min(max_keys, window),
    )
    split = p.num_splits > 1
    partial, normalizers = out, None
    if split:
        size = (batch, num_heads, p.num_splits)
        partial = torch.empty(*size, value_width, dtype=torch.float32, device=q.device)
        normalizers = torch.empty(*size, 2, dtype=torch.float32, device=q.device)
    groups = num_heads // num_key_heads
    options = launch_options(q.device)
    grid = (num_key_heads * cdiv(groups, p.block_heads), p.num_splits, batch)
    _decode_attention_kernel[grid](
        q,
        keys,
        values,
        page_table,
        lengths,
        sinks.contiguous() if sinks is not None else None,
        partial,
        normalizers,
        window,
        p.num_splits,
        scale * LOG2E if softcap is None else 2.0 * LOG2E * scale / softcap,
        softcap and softcap * LOG2E,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        *((0, 0) if values is None else values.stride()[:2]),
        page_table.stride(0),
        GROUPS=groups,
        DIM=dim,
        VALUE_DIM=value_width,
        SHARED=values is None,
        PAGE_SIZE=page_size,
        CHUNKED=chunked,
        HAS_SINKS=sinks is not None,
        HAS_SOFTCAP=softcap is not None,
        SPLIT=split,
        PARTS=p.num_parts,
        BLOCK_H=p.block_heads,
        BLOCK_N=p.block_keys,
        BLOCK_D=block_d // p.num_parts,
        BLOCK_REST=block_rest,
        BLOCK_V=block_v // p.num_parts,
        num_warps=p.num_warps,
        num_stages=p.num_stages,
        **options,
    )
    if split:
        # Programs of one warp with some 1,024 numbers: many warps are slow, perhaps as they wait
        # beside the programs above. DeepSeek-V2-Lite, B 8 at 8192 took 41.3 us with four warps
        # instead, 37.3 with four for 2,048 numbers, 34.6 with one; B 32 at 2048 39.6 with four,
        # 35.1 with one.
        block_splits = next_power_of_2(p.num_splits)
        block_v = min(max(32, 1024 // block_splits), 256, block_v)
        _merge_kernel[(cdiv(value_width, block_v), num_heads, batch)](
            partial,
            normalizers,
            lengths,
            out,
            window,
            p.num_splits,
            VALUE_DIM=value_width,
            CHUNKED=chunked,
            BLOCK_N=p.block_keys,
            BLOCK_SPLITS=block_splits,
            BLOCK_V=block_v,
            num_warps=4 if block_splits > 64 else 1,
            **options,
        )
    return out

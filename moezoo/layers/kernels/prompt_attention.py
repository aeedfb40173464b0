"""prompt_attention: causal attention of chunks of several sequences over a paged cache.

    scores[t, h, s] = scale * sum over d of q[t, h, d] * keys[slot(b, s), h // (Hq / Hk), d]
    out[t, h]       = sum over s of softmax(scores)[t, h, s] * values[slot(b, s), h // (Hq / Hk)]
    slot(b, s)      = page_table[b, s // page_size] * page_size + s % page_size

where query t of sequence b sees the newest `window` of the positions s up to its own, or those of
its chunk if that is `Chunked`. Without a page table keys and values lie packed, one sequence behind
another. The last numbers of keys may be in a tensor of their own, where they are those of all heads
(the rotated ones of MLA).

A program takes one head of the queries of a tile over all keys that they see (flash attention:
Dao, 2023): first the blocks of keys that all of its queries see, then those on the diagonal or at
the edge of the window, with masks. Scores, softmax and sums are fp32; its numerators are rounded
to the dtype of the cache before they multiply values, but not in the sum that divides them. The
output is rounded once.

Legend: T queries of all sequences, B sequences, Hq query heads, Hk key heads, D key width, Dv value
width, S slots of the cache, P pages a sequence may have, N tiles.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.attention_operands import require_operands
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import next_power_of_2
from moezoo.layers.kernels.tiles import can_describe, descriptor, shared_memory
from moezoo.layers.kernels.windows import Chunked, first_key

LOG2E = math.log2(math.e)
TILE = 128
"""Most queries in a tile."""


def query_tiles(num_new: list[int], num_keys: list[int]) -> Tensor:
    """Return the tiles of `prompt_attention`, int32 [5, N] on the host, those with most keys first.

    Sequence b has `num_new[b]` queries, the newest of its `num_keys[b]` keys' tokens. A column has
    the tile's sequence, its first query among all of them, the end of the sequence's queries, the
    position of that first query, and the first key of the sequence where keys lie packed.
    """
    ends = itertools.accumulate(num_new)
    key_ends = itertools.accumulate(num_keys)
    tiles = []
    for b, (new, keys, end, key_end) in enumerate(
        zip(num_new, num_keys, ends, key_ends, strict=True)
    ):
        if not 0 <= new <= keys:
            raise ValueError(f"sequence {b} cannot have {new} new tokens and {keys} keys")
        for first in range(0, new, TILE):
            tiles.append((b, end - new + first, end, keys - new + first, key_end - keys))
    tiles.sort(key=lambda tile: -tile[3])
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 5).T.contiguous()


def prompt_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tensor,
    page_table: Tensor | None = None,
    *,
    page_size: int | None = None,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    shared_keys: Tensor | None = None,
) -> Tensor:
    num_key_heads = keys.shape[1]
    if shared_keys is not None:
        keys = torch.cat((keys, shared_keys[:, None].expand(-1, num_key_heads, -1)), -1)
    out = q.new_zeros(*q.shape[:2], values.shape[2])
    for b, first_row, end, position, key_start in tiles.T.tolist():
        rows = slice(first_row, min(first_row + TILE, end))
        positions = position + torch.arange(rows.stop - rows.start, device=q.device)
        first = 0 if window is None else max(first_key(position, window), 0)
        seen = torch.arange(first, int(positions[-1]) + 1, device=q.device)
        if page_table is None:
            slots = key_start + seen
        else:
            slots = page_table[b, seen // page_size].long() * page_size + seen % page_size
        grouped = q[rows].float().unflatten(1, (num_key_heads, -1))  # [rows, Hk, Hq / Hk, D]
        scores = scale * torch.einsum("tkgd,skd->kgts", grouped, keys[slots].float())
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = seen > positions[:, None]
        if window is not None:
            hidden |= seen < first_key(positions, window)[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(num_key_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., : len(seen)]
        attended = torch.einsum("kgts,skd->tkgd", weights, values[slots].float())
        out[rows] = attended.flatten(1, 2).to(q.dtype)
    return out


@dataclass(frozen=True)
class Plan:
    """How the work is divided: `block_queries` queries a program, `block_keys` keys at a time.

    `descriptors` reads keys and values through the bulk copy engine.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    descriptors: bool


def plan(
    q: Tensor, keys: Sequence[Tensor], values: Tensor, *, key_width: int, page_size: int | None
) -> Plan:
    """Return the plan for q [T, Hq, D], keys in one or two tensors [S, .., D'], values [S, Hk, Dv].

    `key_width` is of both blocks of keys together. A block of keys lies inside one page.
    """
    itemsize = q.element_size()
    value_width = _block_width(values.shape[2])
    row_bytes = (key_width + value_width) * itemsize
    room = shared_memory(q.device) - 4096
    # Two small programs on a multiprocessor overlap one's softmax with the other's products: 76
    # instead of 93 us at 2048 tokens (32 heads of 128, 4 key heads), 1072 instead of 1140 at 8192.
    # Wider heads (192 and 128) leave no room for two, and are faster in blocks of 128 queries.
    block_queries, block_keys = (64, 64) if itemsize == 2 else (32, 32)
    if itemsize == 2 and 128 < key_width <= 256:
        block_queries = TILE
    if page_size is not None:
        block_keys = min(block_keys, page_size)
    while block_keys > 16 and block_keys * row_bytes > 80 * 1024:
        block_keys //= 2
    while block_queries > 16 and room < block_queries * key_width * itemsize + 2 * (
        block_keys * row_bytes
    ):
        block_queries //= 2
    descriptors = itemsize == 2 and all(can_describe(x) for x in (*keys, values))
    buffers = (room - block_queries * key_width * itemsize) // (block_keys * row_bytes)
    return Plan(
        block_queries=block_queries,
        block_keys=block_keys,
        num_warps=8 if block_queries * value_width > 64 * 128 else 4,
        num_stages=max(1, min(3, buffers)),
        descriptors=descriptors,
    )


@triton.jit
def _capped(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(scores / softcap), for which `scale` and `softcap` come multiplied so."""
    if HAS_SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * scale) + 1.0))
    return scores


@triton.jit
def _first_key(position, window, CHUNKED: tl.constexpr):
    """Of those that a query at `position` sees; below 0 where it sees all."""
    return position // window * window if CHUNKED else position - window + 1


@triton.jit
def _hide(scores, positions, keys_at, window, HAS_WINDOW: tl.constexpr, CHUNKED: tl.constexpr):
    seen = keys_at[None, :] <= positions[:, None]
    if HAS_WINDOW:
        seen &= keys_at[None, :] >= _first_key(positions, window, CHUNKED)[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _weights(scores, factor, top, total):
    """The numerators of scores with the new largest score, and what old sums shrink by."""
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["num_tiles", "window"])
def _prompt_attention_kernel(
    q_ptr,
    keys_ptr,
    rest_ptr,
    values_ptr,
    keys_box,
    rest_box,
    values_box,
    tiles_ptr,
    page_table_ptr,
    sinks_ptr,
    out_ptr,
    num_tiles,
    window,
    scale,
    softcap,
    stride_qt,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_rs,
    stride_rh,
    stride_vs,
    stride_vh,
    stride_pb,
    NUM_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST_DIM: tl.constexpr,
    REST_DIM: tl.constexpr,
    REST_SHARED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BOXES: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    PARTS: tl.constexpr = TILE_M // BLOCK_M
    head = tl.program_id(0) % NUM_HEADS
    key_head = head // GROUPS
    part = tl.program_id(0) // NUM_HEADS
    p_tile = tiles_ptr + part // PARTS
    skipped = part % PARTS * BLOCK_M
    first_row = tl.load(p_tile + num_tiles) + skipped
    end = tl.load(p_tile + 2 * num_tiles)
    first_position = tl.load(p_tile + 3 * num_tiles) + skipped
    if PAGE_SIZE is not None:
        p_pages = page_table_ptr + tl.load(p_tile).to(tl.int64) * stride_pb
    else:
        key_start = tl.load(p_tile + 4 * num_tiles)
    if first_row >= end:
        return
    # The program's keys are those of its sequence up to its last query's own.
    num_keys = first_position + tl.minimum(end - first_row, BLOCK_M)
    first_seen = 0
    first_full = 0
    if HAS_WINDOW:
        first_seen = tl.maximum(_first_key(first_position, window, CHUNKED), 0)
        by_last = _first_key(num_keys - 1, window, CHUNKED)
        first_full = tl.cdiv(tl.maximum(by_last, 0), BLOCK_N)
    end_full = (first_position + 1) // BLOCK_N
    first_block = first_seen // BLOCK_N
    end_block = tl.cdiv(num_keys, BLOCK_N)
    if BOXES:
        # A box with slots that nobody has written, or others: their values may be NaN.
        sequence_keys = first_position + end - first_row
        has_tail = end_block * BLOCK_N > sequence_keys
        end_block = tl.minimum(end_block, sequence_keys // BLOCK_N)

    if PAGE_SIZE is not None:
        p_page = p_pages + first_block * BLOCK_N // PAGE_SIZE
        page = tl.load(p_page, mask=first_block < end_block, other=0)
        slot = page * PAGE_SIZE + first_block * BLOCK_N % PAGE_SIZE
        if BOXES:
            p_page = p_pages + end_block * BLOCK_N // PAGE_SIZE
            page = tl.load(p_page, mask=has_tail, other=0)
            tail_slot = page * PAGE_SIZE + end_block * BLOCK_N % PAGE_SIZE
    else:
        slot = key_start + first_block * BLOCK_N
        if BOXES:
            tail_slot = key_start + end_block * BLOCK_N

    rows = first_row + tl.arange(0, BLOCK_M)
    m_rows = rows < end
    positions = first_position + tl.arange(0, BLOCK_M)
    tokens = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    m_cols = cols < FIRST_DIM
    value_cols = tl.arange(0, BLOCK_V)
    m_value_cols = value_cols < VALUE_DIM
    p_q = q_ptr + rows.to(tl.int64)[:, None] * stride_qt + head * stride_qh
    b_q = tl.load(p_q + cols[None, :], mask=m_rows[:, None] & m_cols[None, :], other=0.0)
    if BLOCK_REST:
        rest = tl.arange(0, BLOCK_REST)
        m_rest = rest < REST_DIM
        m_q = m_rows[:, None] & m_rest[None, :]
        b_q_rest = tl.load(p_q + FIRST_DIM + rest[None, :], mask=m_q, other=0.0)
        rest_head = 0 if REST_SHARED else key_head
        p_rest = rest_ptr + rest_head.to(tl.int64) * stride_rh
    p_keys = keys_ptr + key_head.to(tl.int64) * stride_kh
    p_values = values_ptr + key_head.to(tl.int64) * stride_vh

    # Not -inf, so that a row that has seen no key yet has a difference to its top.
    top = tl.full([BLOCK_M], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # As if the sink were a key of value 0.
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32)
        top *= 1.4426950408889634  # LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    factor = 1.0 if HAS_SOFTCAP else scale

    for block in range(first_block, end_block):
        m_next = block + 1 < end_block
        if PAGE_SIZE is not None:
            # One block ahead: a page read where it is used would take every other stage of the
            # pipeline.
            p_page = p_pages + (block + 1) * BLOCK_N // PAGE_SIZE
            next_page = tl.load(p_page, mask=m_next, other=0)
            next_slot = next_page * PAGE_SIZE + (block + 1) * BLOCK_N % PAGE_SIZE
        else:
            next_slot = slot + BLOCK_N
        keys_at = block * BLOCK_N + tokens
        if not BOXES:
            m_keys = (keys_at >= first_seen) & (keys_at < num_keys)
            p_k = p_keys + slot.to(tl.int64) * stride_ks + tokens[:, None] * stride_ks
        if BOXES:
            b_k = tl.reshape(keys_box.load([key_head, slot, 0]), [BLOCK_N, BLOCK_D])
        else:
            m_k = m_keys[:, None] & m_cols[None, :]
            b_k = tl.load(p_k + cols[None, :], mask=m_k, other=0.0)
        scores = tl.dot(b_q, b_k.T, input_precision="ieee")
        if BLOCK_REST:
            if BOXES:
                b_k = tl.reshape(rest_box.load([rest_head, slot, 0]), [BLOCK_N, BLOCK_REST])
            else:
                m_k = m_keys[:, None] & m_rest[None, :]
                p_k = p_rest + slot.to(tl.int64) * stride_rs + tokens[:, None] * stride_rs
                b_k = tl.load(p_k + rest[None, :], mask=m_k, other=0.0)
            scores = tl.dot(b_q_rest, b_k.T, scores, input_precision="ieee")
        if BOXES:
            b_v = tl.reshape(values_box.load([key_head, slot, 0]), [BLOCK_N, BLOCK_V])
        else:
            p_v = p_values + slot.to(tl.int64) * stride_vs + tokens[:, None] * stride_vs
            m_v = m_keys[:, None] & m_value_cols[None, :]
            b_v = tl.load(p_v + value_cols[None, :], mask=m_v, other=0.0)
        scores = _capped(scores, scale, softcap, HAS_SOFTCAP)
        if (block < first_full) | (block >= end_full):
            scores = _hide(scores, positions, keys_at, window, HAS_WINDOW, CHUNKED)
        weights, shrink, top, total = _weights(scores, factor, top, total)
        acc *= shrink[:, None]
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")
        slot = next_slot

    if BOXES:  # noqa: SIM102  (without boxes what is below must not be compiled)
        if has_tail:
            keys_at = end_block * BLOCK_N + tokens
            m_keys = keys_at < num_keys
            slots = (tail_slot + tokens).to(tl.int64)[:, None]
            p_k = p_keys + slots * stride_ks
            m_k = m_keys[:, None] & m_cols[None, :]
            b_k = tl.load(p_k + cols[None, :], mask=m_k, other=0.0)
            if BLOCK_REST:
                m_k = m_keys[:, None] & m_rest[None, :]
                p_k = p_rest + slots * stride_rs
                b_k_rest = tl.load(p_k + rest[None, :], mask=m_k, other=0.0)
            p_v = p_values + slots * stride_vs
            m_v = m_keys[:, None] & m_value_cols[None, :]
            b_v = tl.load(p_v + value_cols[None, :], mask=m_v, other=0.0)
            scores = tl.dot(b_q, b_k.T, input_precision="ieee")
            if BLOCK_REST:
                scores = tl.dot(b_q_rest, b_k_rest.T, scores, input_precision="ieee")
            scores = _capped(scores, scale, softcap, HAS_SOFTCAP)
            scores = _hide(scores, positions, keys_at, window, HAS_WINDOW, CHUNKED)
            weights, shrink, top, total = _weights(scores, factor, top, total)
            acc *= shrink[:, None]
            acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")

    # Rows past the end may have seen no key.
    acc /= tl.where(total > 0.0, total, 1.0)[:, None]
    o_out = (rows.to(tl.int64) * NUM_HEADS + head)[:, None] * VALUE_DIM + value_cols[None, :]
    m_out = m_rows[:, None] & m_value_cols[None, :]
    tl.store(out_ptr + o_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


def _block_width(width: int) -> int:
    return max(16, next_power_of_2(width))


def _block_widths(width: int) -> tuple[int, int]:
    """Return the widths, powers of two, of the two parts of a row of keys; the second may be 0."""
    whole = _block_width(width)
    rest = _block_width(width - whole // 2)
    if width <= 16 or whole // 2 + rest == whole:
        return whole, 0
    return whole // 2, rest


def prompt_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tensor,
    page_table: Tensor | None = None,
    *,
    page_size: int | None = None,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    shared_keys: Tensor | None = None,
) -> Tensor:
    """Return the attention of queries q [T, Hq, D]: [T, Hq, Dv], contiguous, in q's dtype.

    Only rows that are in a tile are written.

    keys [S, Hk, D] and values [S, Hk, Dv] of q's dtype; the new tokens' are among them. With
    `shared_keys` [S, R] keys are [S, Hk, D - R], and these the last numbers of all heads. tiles
    [5, N] int32, from `query_tiles`. page_table [B, P] int32 with pages of `page_size` slots, or
    neither where the keys and values of the sequences lie one behind another. The last stride of q,
    keys, values and page_table is 1. `sinks` [Hq] of any float dtype are one more score a head,
    of a key without a value. `softcap` makes scores softcap * tanh(scores / softcap).

    Slots past a sequence's keys are not read, nor are pages wholly outside the window of all
    queries; but what else is in a page or packed within the window's reach has to be finite.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    require_operands(
        *(q, keys, values, page_table),
        rows="T",
        page_size=page_size,
        window=window,
        sinks=sinks,
        softcap=softcap,
        shared_keys=shared_keys,
    )
    num_rows, num_heads, dim = q.shape
    num_key_heads = keys.shape[1]
    if tiles.ndim != 2 or tiles.shape[0] != 5 or tiles.dtype != torch.int32:
        raise ValueError(f"tiles must be int32 [5, N], got {list(tiles.shape)} {tiles.dtype}")
    if (page_table is None) != (page_size is None):
        raise ValueError("page_table and page_size go together")
    if page_table is not None and (page_table.ndim != 2 or page_table.dtype != torch.int32):
        raise ValueError(
            f"page_table must be int32 [B, P], got {list(page_table.shape)} {page_table.dtype}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    value_width = values.shape[2]
    out = torch.empty(num_rows, num_heads, value_width, dtype=q.dtype, device=q.device)
    num_tiles = tiles.shape[1]
    if out.numel() == 0 or num_tiles == 0:
        return out
    if shared_keys is not None:
        block_d, block_rest = _block_width(keys.shape[2]), _block_width(shared_keys.shape[1])
        first, rest = keys, shared_keys[:, None]
    else:
        block_d, block_rest = _block_widths(dim)
        first, rest = keys[..., :block_d], keys[..., block_d:]
    parts = (first, rest) if block_rest else (first,)
    p = plan(q, parts, values, key_width=block_d + block_rest, page_size=page_size)
    block_v = _block_width(value_width)
    keys_box = rest_box = values_box = None
    if p.descriptors:
        keys_box = descriptor(first.transpose(0, 1), (1, p.block_keys, block_d))
        if block_rest:
            rest_box = descriptor(rest.transpose(0, 1), (1, p.block_keys, block_rest))
        values_box = descriptor(values.transpose(0, 1), (1, p.block_keys, block_v))
    grid = (num_tiles * (TILE // p.block_queries) * num_heads,)
    _prompt_attention_kernel[grid](
        q,
        first,
        rest,
        values,
        keys_box,
        rest_box,
        values_box,
        tiles.contiguous(),
        page_table,
        sinks.contiguous() if sinks is not None else None,
        out,
        num_tiles,
        int(window or 0),
        scale * LOG2E if softcap is None else 2.0 * LOG2E * scale / softcap,
        softcap and softcap * LOG2E,
        q.stride(0),
        q.stride(1),
        *first.stride()[:2],
        *rest.stride()[:2],
        *values.stride()[:2],
        page_table.stride(0) if page_table is not None else 0,
        NUM_HEADS=num_heads,
        GROUPS=num_heads // num_key_heads,
        FIRST_DIM=first.shape[2],
        REST_DIM=rest.shape[2],
        REST_SHARED=shared_keys is not None,
        VALUE_DIM=value_width,
        PAGE_SIZE=page_size,
        HAS_WINDOW=window is not None,
        CHUNKED=isinstance(window, Chunked),
        HAS_SINKS=sinks is not None,
        HAS_SOFTCAP=softcap is not None,
        BOXES=p.descriptors,
        TILE_M=TILE,
        BLOCK_M=p.block_queries,
        BLOCK_N=p.block_keys,
        BLOCK_D=block_d,
        BLOCK_REST=block_rest,
        BLOCK_V=block_v,
        num_warps=p.num_warps,
        num_stages=p.num_stages,
        **launch_options(q.device),
    )
    return out

"""permute: the T*K chosen rows by expert, and the tiles that the matrix products work on.

    order     = stable_argsort(topk_ids.flatten()), without the ids outside 0..E-1
    positions = where in that order each choice is, -1 for an id outside 0..E-1
    offsets   = offsets[e] rows have an id in 0..e-1
    tiles     = every expert's rows in tiles of `tile_rows`: (expert, first row), experts in order

One program per block of tokens ranks the block's rows among those of the same expert by counting:
within the block in a [tokens, E] table, before it from the blocks' histograms, which a launch
before counts where there is more than one block. No atomics, so the order is stable.

Legend: T tokens, K experts per token, S = T*K rows, E experts, N the most tiles there can be,
B blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait

MAX_BLOCK = 8192
"""Elements of the [tokens, E] table of a block: what 8 warps hold in registers."""


class Permutation(NamedTuple):
    """All int32: order [S], positions [T, K], offsets [E+1], tiles [2, N], num_tiles [1].

    tiles[0, i] is the expert and tiles[1, i] the first row, in expert order, of tile i. Of order,
    offsets[E] elements are written, of each row of tiles num_tiles.
    """

    order: Tensor
    positions: Tensor
    offsets: Tensor
    tiles: Tensor
    num_tiles: Tensor


def max_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """N, known without looking at the ids: each expert may leave one tile part full."""
    return min(num_rows, num_rows // tile_rows + min(num_rows, num_experts))


def permute_ref(topk_ids: Tensor, num_experts: int, tile_rows: int) -> Permutation:
    ids = topk_ids.flatten().tolist()
    by_expert = [[i for i, id_ in enumerate(ids) if id_ == e] for e in range(num_experts)]
    offsets = [0]
    tiles = []
    for e, rows in enumerate(by_expert):
        tiles += [(e, offsets[e] + first) for first in range(0, len(rows), tile_rows)]
        offsets.append(offsets[e] + len(rows))

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=topk_ids.device)

    order = [i for rows in by_expert for i in rows]
    place = {row: position for position, row in enumerate(order)}
    positions = int32([place.get(i, -1) for i in range(len(ids))]).view(topk_ids.shape)
    order += [i for i in range(len(ids)) if i not in place]
    tiles_ = int32([number for tile in tiles for number in tile]).view(-1, 2).T.contiguous()
    return Permutation(int32(order), positions, int32(offsets), tiles_, int32([len(tiles)]))


@triton.jit(do_not_specialize=["num_tokens"])
def _histogram_kernel(
    ids_ptr,
    histogram_ptr,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for k in tl.static_range(K):
        ids = tl.load(ids_ptr + tokens * K + k, mask=tokens < num_tokens, other=-1)
        counts += (ids[:, None] == experts[None, :]).to(tl.int32)
    p_histogram = histogram_ptr + tl.program_id(0) * num_experts + experts
    tl.store(p_histogram, tl.sum(counts, 0), mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "max_tiles"])
def _permute_kernel(
    ids_ptr,
    histogram_ptr,
    order_ptr,
    positions_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_tokens,
    num_experts,
    num_blocks,
    max_tiles,
    K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    block = tl.program_id(0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    m_tokens = tokens < num_tokens
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for k in tl.static_range(K):
        ids = tl.load(ids_ptr + tokens * K + k, mask=m_tokens, other=-1)
        counts += (ids[:, None] == experts[None, :]).to(tl.int32)

    if ONE_BLOCK:
        total = tl.sum(counts, 0)
        before = tl.zeros([BLOCK_E], tl.int32)
    else:
        all_blocks = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
        earlier = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
        for start in range(0, num_blocks, BLOCK_B):
            blocks = start + tl.arange(0, BLOCK_B)
            m_blocks = (blocks < num_blocks)[:, None] & (experts < num_experts)[None, :]
            p_blocks = histogram_ptr + blocks[:, None] * num_experts + experts[None, :]
            histogram = tl.load(p_blocks, mask=m_blocks, other=0)
            all_blocks += histogram
            earlier += tl.where((blocks < block)[:, None], histogram, 0)
        total = tl.sum(all_blocks, 0)
        before = tl.sum(earlier, 0)
    offsets = tl.cumsum(total, 0) - total

    # Where the next row of each expert goes, for each token of the block.
    places = (offsets + before)[None, :] + tl.cumsum(counts, 0) - counts
    for k in tl.static_range(K):
        ids = tl.load(ids_ptr + tokens * K + k, mask=m_tokens, other=-1)
        chosen = ids[:, None] == experts[None, :]
        place = tl.sum(tl.where(chosen, places, 0), 1)
        present = (ids >= 0) & (ids < num_experts)
        tl.store(order_ptr + place, tokens * K + k, mask=present)
        p_positions = positions_ptr + tokens * K + k
        tl.store(p_positions, tl.where(present, place, -1), mask=m_tokens)
        places += chosen.to(tl.int32)

    if block == 0:
        m_experts = experts < num_experts
        tl.store(offsets_ptr + 1 + experts, offsets + total, mask=m_experts)
        tl.store(offsets_ptr + experts, offsets, mask=experts == 0)
        tiles = (total + TILE_ROWS - 1) // TILE_ROWS
        first = tl.cumsum(tiles, 0) - tiles
        for i in range(0, tl.max(tiles, 0)):
            m_tiles = i < tiles
            tl.store(tiles_ptr + first + i, experts, mask=m_tiles)
            tl.store(tiles_ptr + max_tiles + first + i, offsets + i * TILE_ROWS, mask=m_tiles)
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))


def permute(topk_ids: Tensor, num_experts: int, tile_rows: int) -> Permutation:
    """topk_ids [T, K] int32 or int64 -> Permutation.

    Raises ValueError for other ids, or more than 2**31 - 1 rows.
    """
    if topk_ids.ndim != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_ids must be [T, K] int32 or int64, got {list(topk_ids.shape)} {topk_ids.dtype}"
        )
    num_rows = topk_ids.numel()
    if num_rows >= 2**31:
        raise ValueError(f"topk_ids must have fewer than 2**31 elements, got {num_rows}")
    topk_ids = topk_ids.contiguous()
    num_tokens, k = topk_ids.shape
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, min(64, MAX_BLOCK // block_e, triton.next_power_of_2(max(1, num_tokens))))
    num_blocks = triton.cdiv(num_tokens, block_t)
    n = max_tiles(num_rows, num_experts, tile_rows)

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    out = Permutation(
        int32(num_rows), int32(num_tokens, k), int32(num_experts + 1), int32(2, n), int32(1)
    )
    options = launch_options(topk_ids.device)
    histogram = None
    if num_blocks > 1:
        histogram = int32(num_blocks, num_experts)
        _histogram_kernel[(num_blocks,)](
            topk_ids,
            histogram,
            num_tokens,
            num_experts,
            K=k,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            num_warps=8,
            **options,
        )
    _permute_kernel[(max(1, num_blocks),)](
        topk_ids,
        histogram,
        *out,
        num_tokens,
        num_experts,
        num_blocks,
        n,
        K=k,
        ONE_BLOCK=num_blocks <= 1,
        TILE_ROWS=tile_rows,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_B=min(MAX_BLOCK // 2 // block_e, triton.next_power_of_2(num_blocks + 1)) or 1,
        num_warps=8,
        **options,
    )
    return out

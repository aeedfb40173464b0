"""permute: the T*K chosen rows by expert, and the tiles that the matrix products work on.

    order   = stable_argsort(topk_ids.flatten()), ids outside 0..E-1 last
    offsets = offsets[e] rows have an id in 0..e-1

Expert e's rows are cut into tiles of `tile_rows`, numbered from `first_tile(e)`. To know that
number without a scan over all the experts, numbers are left out: where there are fewer rows than
tiles could be, a tile is numbered by its first row, else expert e begins at
offsets[e] // tile_rows + e. Either leaves room for the ceil(rows / tile_rows) tiles of each expert.
tile_experts[i] is the expert of tile i, or -1 where nobody got the number.

One program per expert counts the rows before its own, then ranks its own, reading all the ids
twice; no atomics, so the order is stable and the same every time.

Legend: T tokens, K experts per token, S = T*K rows, E experts, N tile numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def num_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """N, how many tile numbers there are for S rows, known without looking at the ids."""
    return min(num_rows, num_rows // tile_rows + num_experts)


def permute_ref(
    topk_ids: Tensor, num_experts: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    ids = topk_ids.flatten().tolist()
    by_expert = [[i for i, id_ in enumerate(ids) if id_ == e] for e in range(num_experts)]
    nobodys = [i for i, id_ in enumerate(ids) if not 0 <= id_ < num_experts]
    n = num_tiles(len(ids), num_experts, tile_rows)
    offsets, tile_experts = [0], [-1] * n
    for e, rows in enumerate(by_expert):
        first = offsets[e] if n == len(ids) else offsets[e] // tile_rows + e
        for tile in range(-(-len(rows) // tile_rows)):
            tile_experts[first + tile] = e
        offsets.append(offsets[e] + len(rows))
    order = [i for rows in [*by_expert, nobodys] for i in rows]
    return (
        torch.tensor(order, dtype=torch.int32, device=topk_ids.device),
        torch.tensor(offsets, dtype=torch.int32, device=topk_ids.device),
        torch.tensor(tile_experts, dtype=torch.int32, device=topk_ids.device),
    )


@triton.jit
def first_tile(expert, offset, TILE_ROWS: tl.constexpr, TILE_PER_ROW: tl.constexpr):
    """The number of an expert's first tile, given its offset."""
    if TILE_PER_ROW:
        return offset
    else:
        return offset // TILE_ROWS + expert


@triton.jit
def _permute_kernel(
    topk_ids_ptr,
    order_ptr,
    offsets_ptr,
    tile_experts_ptr,
    num_rows,
    num_experts,
    num_tiles,
    TILE_ROWS: tl.constexpr,
    TILE_PER_ROW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Program E stands for the rows that nobody computes.
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_S)
    before = tl.zeros([BLOCK_S], tl.int32)
    own = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, num_rows, BLOCK_S):
        rows = start + lanes
        m_rows = rows < num_rows
        ids = tl.load(topk_ids_ptr + rows, mask=m_rows, other=-1)
        ids = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        before += (m_rows & (ids < expert)).to(tl.int32)
        own += (m_rows & (ids == expert)).to(tl.int32)
    offset = tl.sum(before, 0)
    count = tl.sum(own, 0)
    tl.store(offsets_ptr + expert, offset)

    begin = first_tile(expert, offset, TILE_ROWS, TILE_PER_ROW)
    end = first_tile(expert + 1, offset + count, TILE_ROWS, TILE_PER_ROW)
    end = tl.where(expert == num_experts, num_tiles, end)
    used = tl.where(expert == num_experts, begin, begin + tl.cdiv(count, TILE_ROWS))
    for start in range(begin, end, BLOCK_N):
        tiles = start + tl.arange(0, BLOCK_N)
        tl.store(tile_experts_ptr + tiles, tl.where(tiles < used, expert, -1), mask=tiles < end)

    if count > 0:
        rank = offset
        for start in range(0, num_rows, BLOCK_S):
            rows = start + lanes
            m_rows = rows < num_rows
            ids = tl.load(topk_ids_ptr + rows, mask=m_rows, other=-1)
            ids = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts)
            mine = (m_rows & (ids == expert)).to(tl.int32)
            tl.store(order_ptr + rank + tl.cumsum(mine, 0) - 1, rows, mask=mine == 1)
            rank += tl.sum(mine, 0)


def permute(topk_ids: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_ids [T, K] int32 or int64 -> order [S], offsets [E+1], tile_experts [N], all int32.

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
    n = num_tiles(num_rows, num_experts, tile_rows)
    order = torch.empty(num_rows, dtype=torch.int32, device=topk_ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=topk_ids.device)
    tile_experts = torch.empty(n, dtype=torch.int32, device=topk_ids.device)
    block = min(4096, max(128, triton.next_power_of_2(num_rows)))
    _permute_kernel[(num_experts + 1,)](
        topk_ids,
        order,
        offsets,
        tile_experts,
        num_rows,
        num_experts,
        n,
        TILE_ROWS=tile_rows,
        TILE_PER_ROW=n == num_rows,
        BLOCK_S=block,
        BLOCK_N=128,
        num_warps=8 if block > 1024 else 4,
    )
    return order, offsets, tile_experts

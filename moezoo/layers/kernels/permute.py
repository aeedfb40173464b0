"""permute: sorts the T*K chosen rows by expert, and lists the tiles of the matrix products.

    order     = stable_argsort(topk_ids.flatten()), without the ids outside 0..E-1
    positions = where in that order each choice is, -1 for an id outside 0..E-1
    offsets   = offsets[e] rows have an id in 0..e-1
    tiles     = every expert's rows in tiles of `tile_rows`: (expert, first row, end of its rows),
                experts in order

Few rows take one launch: a program per expert reads all the choices; it counts everybody's rows,
which says where its own begin, then ranks its own. Many rows take two: blocks of rows are
counted, then each is sorted and moved to where the blocks before it end. Nothing depends on which
program is first, so the order is stable.

Legend: T tokens, K experts per token, S = T*K rows, E experts, N the most tiles there can be.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2

FEW_ROWS = 8192
"""Most rows for which one launch is faster than two (H100, 128 experts)."""

COUNTS = 2**14
"""Number of counts, blocks times experts, that a program loads at once: 32 blocks at a time took
14.5 us for 65,536 rows of 128 experts, 128 take 9.9 (H100)."""


def block_rows(num_rows: int) -> int:
    """Return how many rows one program sorts, where there are many.

    512 took 7.0 us for 12,288 rows of 64 experts, 1024 took 11.0 (H100); but with more programs,
    each adds up more counts.
    """
    return 512 if num_rows <= 2**16 else 1024


class Permutation(NamedTuple):
    """Rows in expert order, all int32.

    order [S], positions [T, K], offsets [E+1], tiles [3, N], num_tiles [1].

    tiles[:, i] is the expert of tile i, its first row in expert order, and the end of the expert's
    rows. Of order, offsets[E] elements are written, of each row of tiles num_tiles; `one_matrix`
    makes one without an order, whose tiles are all written and num_tiles None.
    """

    order: Tensor
    positions: Tensor
    offsets: Tensor
    tiles: Tensor
    num_tiles: Tensor | None


def max_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Return N, a bound that does not depend on the ids: each expert may have a partial tile."""
    return min(num_rows, num_rows // tile_rows + min(num_rows, num_experts))


def permute_ref(topk_ids: Tensor, num_experts: int, tile_rows: int) -> Permutation:
    ids = topk_ids.flatten().tolist()
    by_expert = [[i for i, id_ in enumerate(ids) if id_ == e] for e in range(num_experts)]
    offsets = [0]
    tiles = []
    for e, rows in enumerate(by_expert):
        offsets.append(offsets[e] + len(rows))
        tiles += [(e, first, offsets[-1]) for first in range(offsets[e], offsets[-1], tile_rows)]

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=topk_ids.device)

    order = [i for rows in by_expert for i in rows]
    place = {row: position for position, row in enumerate(order)}
    positions = int32([place.get(i, -1) for i in range(len(ids))]).view(topk_ids.shape)
    order += [i for i in range(len(ids)) if i not in place]
    tiles_ = int32([number for tile in tiles for number in tile]).view(-1, 3).T.contiguous()
    return Permutation(int32(order), positions, int32(offsets), tiles_, int32([len(tiles)]))


@triton.jit
def store_tiles(
    expert,
    offset,
    own_rows,
    first_tile,
    tiles_ptr,
    max_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    own_tiles = tl.cdiv(own_rows, TILE_ROWS)
    for start in range(0, own_tiles, BLOCK_N):
        tile = start + tl.arange(0, BLOCK_N)
        mask = tile < own_tiles
        p_tiles = tiles_ptr + first_tile + tile
        tl.store(p_tiles, tl.zeros([BLOCK_N], tl.int32) + expert, mask=mask)
        tl.store(p_tiles + max_tiles, offset + tile * TILE_ROWS, mask=mask)
        tl.store(
            p_tiles + 2 * max_tiles, tl.zeros([BLOCK_N], tl.int32) + offset + own_rows, mask=mask
        )


@triton.jit
def permute_expert(
    expert,
    ids_ptr,
    order_ptr,
    positions_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_rows,
    num_experts,
    max_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK_S)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    blocks = ()
    for b in tl.static_range(BLOCKS):
        rows = b * BLOCK_S + lanes
        ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1)
        present = (ids >= 0) & (ids < num_experts)
        counts += tl.histogram(tl.where(present, ids, 0).to(tl.int32), BLOCK_E, mask=present)
        blocks += (ids,)
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    offset = tl.sum(tl.where(experts < expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    own_rows = tl.sum(tl.where(experts == expert, counts, 0), 0)
    tl.store(offsets_ptr + expert, offset)
    store_tiles(expert, offset, own_rows, first_tile, tiles_ptr, max_tiles, TILE_ROWS, BLOCK_N)
    if expert == num_experts - 1:
        tl.store(offsets_ptr + num_experts, offset + own_rows)
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))

    # The first program also marks the choices of nobody.
    if (own_rows > 0) | (expert == 0):
        for b in tl.static_range(BLOCKS):
            rows = b * BLOCK_S + lanes
            own = (blocks[b] == expert).to(tl.int32)
            places = offset + tl.cumsum(own, 0) - 1
            tl.store(order_ptr + places, rows, mask=own == 1)
            tl.store(positions_ptr + rows, places, mask=own == 1)
            if expert == 0:
                nobodys = (blocks[b] < 0) | (blocks[b] >= num_experts)
                tl.store(positions_ptr + rows, -1, mask=nobodys & (rows < num_rows))
            if b < BLOCKS - 1:
                offset += tl.sum(own, 0)


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def _permute_kernel(
    ids_ptr,
    order_ptr,
    positions_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_rows,
    num_experts,
    max_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    # fmt: off
    permute_expert(
        tl.program_id(0), ids_ptr, order_ptr, positions_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
        num_rows, num_experts, max_tiles, TILE_ROWS, BLOCKS, BLOCK_S, BLOCK_E, BLOCK_N,
    )
    # fmt: on


@triton.jit
def count_block(
    block,
    ids_ptr,
    counts_ptr,
    num_rows,
    num_experts,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = block * BLOCK_S + tl.arange(0, BLOCK_S)
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1)
    present = (ids >= 0) & (ids < num_experts)
    counts = tl.histogram(tl.where(present, ids, 0).to(tl.int32), BLOCK_E, mask=present)
    tl.store(counts_ptr + block * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(
    ids_ptr,
    counts_ptr,
    num_rows,
    num_experts,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    count_block(tl.program_id(0), ids_ptr, counts_ptr, num_rows, num_experts, BLOCK_S, BLOCK_E)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "max_tiles"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    positions_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_rows,
    num_experts,
    num_blocks,
    max_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    block = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)[:, None]
        p_counts = counts_ptr + blocks * BLOCK_E + experts[None, :]
        of_blocks = tl.load(p_counts, mask=blocks < num_blocks, other=0)
        counts += tl.sum(of_blocks, 0)
        before += tl.sum(tl.where(blocks < block, of_blocks, 0), 0)
    offsets = tl.cumsum(counts, 0) - counts
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tiles = tl.cumsum(tiles, 0) - tiles
    if block == 0:
        tl.store(offsets_ptr + experts, offsets, mask=experts < num_experts)
        tl.store(offsets_ptr + num_experts, tl.sum(counts, 0))
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for expert in range(block, num_experts, num_blocks):
        its = experts == expert
        offset = tl.sum(tl.where(its, offsets, 0), 0)
        own_rows = tl.sum(tl.where(its, counts, 0), 0)
        first_tile = tl.sum(tl.where(its, first_tiles, 0), 0)
        store_tiles(expert, offset, own_rows, first_tile, tiles_ptr, max_tiles, TILE_ROWS, BLOCK_N)

    lanes = tl.arange(0, BLOCK_S)
    rows = block * BLOCK_S + lanes
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=-1)
    present = (ids >= 0) & (ids < num_experts)
    # By expert, then by row; the choices of nobody last.
    keys = tl.sort(tl.where(present, ids, BLOCK_E).to(tl.int32) * BLOCK_S + lanes)
    ids = keys // BLOCK_S
    rows = block * BLOCK_S + keys % BLOCK_S
    own = tl.load(counts_ptr + block * BLOCK_E + experts)
    shift = offsets + before - (tl.cumsum(own, 0) - own)
    places = lanes + tl.gather(shift, tl.minimum(ids, BLOCK_E - 1), 0)
    tl.store(order_ptr + places, rows, mask=ids < BLOCK_E)
    tl.store(positions_ptr + rows, tl.where(ids < BLOCK_E, places, -1), mask=rows < num_rows)


def empty_permutation(topk_ids: Tensor, num_experts: int, tile_rows: int) -> Permutation:
    """Return uninitialised tensors for the permutation of topk_ids; raises as `permute` does."""
    if topk_ids.ndim != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"topk_ids must be [T, K] int32 or int64, got {list(topk_ids.shape)} {topk_ids.dtype}"
        )
    num_rows = topk_ids.numel()
    if num_rows >= 2**31:
        raise ValueError(f"topk_ids must have fewer than 2**31 elements, got {num_rows}")
    n = max_tiles(num_rows, num_experts, tile_rows)

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    return Permutation(
        int32(num_rows), int32(*topk_ids.shape), int32(num_experts + 1), int32(3, n), int32(1)
    )


def few_rows_options(num_rows: int, num_experts: int, *, most: int) -> dict[str, int]:
    """Return the launch options of `permute_expert` for few rows, in blocks of up to `most`."""
    block = min(most, max(128, next_power_of_2(num_rows)))
    return {
        "BLOCKS": next_power_of_2(cdiv(num_rows, block)),
        "BLOCK_S": block,
        "BLOCK_E": next_power_of_2(num_experts),
        "BLOCK_N": 32,
        "num_warps": 8 if block > 1024 else 4,
    }


def permute(topk_ids: Tensor, num_experts: int, tile_rows: int) -> Permutation:
    """Return the permutation of topk_ids [T, K] int32 or int64.

    Raises ValueError for other ids, or more than 2**31 - 1 rows.
    """
    out = empty_permutation(topk_ids, num_experts, tile_rows)
    num_rows, topk_ids = topk_ids.numel(), topk_ids.contiguous()
    if num_rows <= FEW_ROWS:
        _permute_kernel[(num_experts,)](
            topk_ids,
            *out,
            num_rows,
            num_experts,
            out.tiles.shape[1],
            TILE_ROWS=tile_rows,
            **few_rows_options(num_rows, num_experts, most=4096),
            **launch_options(topk_ids.device),
        )
        return out
    counts = empty_counts(num_rows, num_experts, topk_ids.device)
    _count_kernel[(len(counts),)](
        topk_ids,
        counts,
        num_rows,
        num_experts,
        BLOCK_S=block_rows(num_rows),
        BLOCK_E=counts.shape[1],
        **launch_options(topk_ids.device),
    )
    place(topk_ids, counts, out, num_experts, tile_rows)
    return out


def empty_counts(num_rows: int, num_experts: int, device: torch.device) -> Tensor:
    """Return memory for the counts of rows by block and expert, int32 [blocks, E rounded up]."""
    shape = (cdiv(num_rows, block_rows(num_rows)), next_power_of_2(num_experts))
    return torch.empty(shape, dtype=torch.int32, device=device)


def place(
    topk_ids: Tensor, counts: Tensor, out: Permutation, num_experts: int, tile_rows: int
) -> None:
    """Launch the second kernel for many rows: fill `out` from contiguous ids and their counts."""
    num_blocks, block_e = counts.shape
    _place_kernel[(num_blocks,)](
        topk_ids,
        counts,
        *out,
        topk_ids.numel(),
        num_experts,
        num_blocks,
        out.tiles.shape[1],
        TILE_ROWS=tile_rows,
        BLOCK_S=block_rows(topk_ids.numel()),
        BLOCK_B=max(1, min(COUNTS // block_e, next_power_of_2(num_blocks))),
        BLOCK_E=block_e,
        BLOCK_N=32,
        num_warps=8,
        **launch_options(topk_ids.device),
    )

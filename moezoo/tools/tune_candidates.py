"""Tiles that `tune` tries for the products of a layer, by the number of rows per expert."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from moezoo.formats import FP8, INT4, INT8, MXFP4
from moezoo.layers.kernels.tiles import Tile
from moezoo.layers.quant import Int4, Int8, Mxfp4
from moezoo.layers.quant.fp8 import BLOCK


def gated_up_tiles(rows_per_expert: float) -> Iterator[Tile]:
    """Return candidates for the first product."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            first = Tile(m, 64, 128, 4, 3, descriptors=True, weights_first=True)
            yield first
            yield replace(first, k=256)
            yield replace(first, k=64, num_stages=6)
            yield replace(first, group_m=1)
    if 16 < rows_per_expert <= 400:
        tile = Tile(64, 128, 64, 4, 4, descriptors=True)
        for tail in (0, 32):
            for group_m in (1, 4, 8):
                yield replace(tile, tail=tail, group_m=group_m)
        yield replace(tile, num_warps=8)
        yield Tile(64, 64, 128, 4, 2, descriptors=True, weights_first=True)
    if rows_per_expert > 24:
        tile = Tile(128, 128, 64, 8, 4, descriptors=True)
        for tail in (0, 32, 64):
            for group_m in (2, 4, 8, 16):
                yield replace(tile, tail=tail, group_m=group_m)
        for group_m in (8, 16):
            yield replace(tile, programs_per_sm=1, group_m=group_m)


def down_tiles(rows_per_expert: float) -> Iterator[Tile]:
    """Return candidates for the second product."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            first = Tile(m, 64, 128, 4, 4, descriptors=True, weights_first=True)
            yield first
            yield replace(first, num_stages=3)
            yield replace(first, n=128, num_stages=3)
            yield replace(first, k=256, num_stages=3)
            yield replace(first, n=128, k=64, programs_per_sm=2)
    if 16 < rows_per_expert <= 400:
        tile = Tile(64, 128, 64, 4, 4, descriptors=True)
        for tail in (0, 32):
            yield replace(tile, tail=tail)
            yield replace(tile, tail=tail, num_stages=3)
        yield replace(tile, weights_first=True)
        yield replace(tile, programs_per_sm=2)
        yield replace(tile, n=256, programs_per_sm=1)
    if rows_per_expert > 24:
        tile = Tile(128, 256, 64, 8, 4, descriptors=True)
        small = Tile(128, 128, 64, 4, 3, descriptors=True)
        for group_m in (4, 8, 16):
            yield replace(tile, programs_per_sm=1, group_m=group_m)
        yield tile
        yield replace(tile, tail=64)
        yield replace(small, tail=64)
        yield replace(small, tail=32)
        yield replace(small, tail=64, group_m=4)
        yield replace(small, programs_per_sm=2)


def gated_up_fp8_tiles(rows_per_expert: float) -> Iterator[Tile]:
    """Return candidates for the first product in block fp8: n and k are 128."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            first = Tile(m, 128, 128, 8, 3, descriptors=True, weights_first=True)
            for num_stages in (2, 3, 4):
                yield replace(first, num_stages=num_stages)
                if m < 64:
                    yield replace(first, num_stages=num_stages, num_warps=4)
            yield replace(first, group_m=1)
    if 12 < rows_per_expert <= 400:
        tile = Tile(64, 128, 128, 8, 4, descriptors=True)
        yield tile
        yield replace(tile, num_stages=2)
        yield replace(tile, num_warps=4, num_stages=2)
        yield replace(tile, num_warps=4, num_stages=3)
        yield replace(tile, tail=32)
    if rows_per_expert > 24:
        tile = Tile(128, 128, 128, 8, 4, descriptors=True)
        for tail in (0, 32, 64):
            for group_m in (4, 8, 16):
                yield replace(tile, tail=tail, group_m=group_m)
        yield replace(tile, programs_per_sm=1)


def down_fp8_tiles(rows_per_expert: float) -> Iterator[Tile]:
    """Return candidates for the second product in block fp8: k is 128."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            first = Tile(m, 128, 128, 8, 4, descriptors=True, weights_first=True)
            yield first
            yield replace(first, n=256, num_stages=3)
            if m < 64:
                yield replace(first, num_warps=4)
                yield replace(first, n=64, num_warps=4)
                yield replace(first, n=64, num_warps=4, num_stages=8)
    if 12 < rows_per_expert <= 400:
        tile = Tile(64, 128, 128, 4, 4, descriptors=True)
        yield tile
        yield replace(tile, num_stages=3)
        yield replace(tile, n=256, num_warps=8)
        yield replace(tile, n=256, num_warps=8, programs_per_sm=1)
    if rows_per_expert > 24:
        for n in (128, 256):
            tile = Tile(128, n, 128, 8, 4, descriptors=True)
            yield tile
            yield replace(tile, tail=64)
            yield replace(tile, num_stages=3)
            yield replace(tile, programs_per_sm=1)
            yield replace(tile, group_m=16)


def gated_up_weight_only_tiles(rows_per_expert: float, *, bits: int) -> Iterator[Tile]:
    """Return candidates for the first product with weights of 4 or 8 bits."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            yield from _tiles(m, [(32, 256, 4, 3), (32, 256, 4, 4), (32, 128, 4, 5)], bits)
            yield from _tiles(m, [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 8, 3)], bits)
    if 16 < rows_per_expert <= 100:
        if rows_per_expert > 40:
            yield from _tiles(64, [(64, 128, 4, 3)], bits)
        yield from _tiles(64, [(64, 64, 4, 4), (128, 128, 8, 3)], bits)
    if rows_per_expert > 24:
        for tile in _tiles(128, [(64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 8, 4)], bits):
            yield tile
            yield replace(tile, tail=64)
        yield from _tiles(128, [(64, 64, 8, 4), (128, 128, 8, 3)], bits)
    if rows_per_expert > 200 and bits == 4:
        (tile,) = _tiles(256, [(64, 128, 8, 3)], bits)
        yield tile
        yield replace(tile, tail=128)


def down_weight_only_tiles(rows_per_expert: float, *, bits: int) -> Iterator[Tile]:
    """Return candidates for the second product with weights of 4 or 8 bits."""
    if rows_per_expert <= 40:
        for m in _few_rows(rows_per_expert):
            yield from _tiles(m, [(64, 128, 4, 4), (64, 256, 4, 3), (64, 512, 4, 3)], bits)
            yield from _tiles(m, [(128, 128, 4, 3), (128, 128, 4, 4), (128, 256, 8, 3)], bits)
    if 16 < rows_per_expert <= 100:
        yield from _tiles(64, [(128, 64, 4, 4), (128, 128, 8, 4), (256, 128, 8, 3)], bits)
    if rows_per_expert > 24:
        for tile in _tiles(128, [(128, 128, 4, 3), (128, 128, 8, 3)], bits):
            yield tile
            yield replace(tile, tail=64)
        yield from _tiles(128, [(64, 128, 4, 3), (128, 64, 4, 4), (128, 256, 8, 3)], bits)
    if rows_per_expert > 200 and bits == 4:
        (tile,) = _tiles(256, [(128, 128, 8, 3)], bits)
        yield tile
        yield replace(tile, tail=128)


def _tiles(m: int, sizes: list[tuple[int, int, int, int]], bits: int) -> Iterator[Tile]:
    """Return tiles from (n, k at 4 bits, warps, stages); at 8 bits k is halved."""
    for n, k, num_warps, num_stages in sizes:
        yield Tile(m, n, k * 4 // bits, num_warps, num_stages, descriptors=True, weights_first=True)


def _few_rows(rows_per_expert: float) -> tuple[int, ...]:
    return (16,) if rows_per_expert <= 6 else (16, 32) if rows_per_expert <= 14 else (32, 64)


TilesByRows = Callable[[float], Iterator[Tile]]


@dataclass(frozen=True)
class Search:
    """Tiles to try for both products, by the number of rows per expert.

    Hidden and intermediate sizes must be multiples of `step` (what the bulk copy engine reads, or a
    group of int4) and no less than `smallest`, the least k that is tried at every number of rows.
    """

    gated_up: TilesByRows
    down: TilesByRows
    step: int
    smallest: int


def _weight_only(bits: int, *, step: int, smallest: int) -> Search:
    return Search(
        partial(gated_up_weight_only_tiles, bits=bits),
        partial(down_weight_only_tiles, bits=bits),
        step,
        smallest,
    )


SEARCHES: dict[str | None, Search] = {
    None: Search(gated_up_tiles, down_tiles, step=8, smallest=64),
    FP8: Search(gated_up_fp8_tiles, down_fp8_tiles, step=16, smallest=BLOCK),
    INT8: _weight_only(Int8.bits, step=16, smallest=64),
    INT4: _weight_only(Int4.bits, step=128, smallest=128),
    MXFP4: _weight_only(Mxfp4.bits, step=32, smallest=128),
}
"""Quantisation -> its search; None is weights of 16 bits."""

"""Tiles for the tests of the two grouped products."""

import pytest
import torch
from torch import Tensor

from moezoo.layers.kernels.overlap import capability
from moezoo.layers.kernels.permute import Permutation, permute_ref
from moezoo.layers.kernels.tiles import Tile

# Every way through the kernel; descriptors take rows of a multiple of 16 bytes.
TILES = {
    "plain": Tile(16, 32, 32, 4, 2),
    "many": Tile(128, 32, 32, 4, 2),
    "tail": Tile(64, 32, 32, 4, 2, tail=16),
    "persistent": Tile(16, 32, 32, 4, 2, programs_per_sm=1, group_m=2),
    "weights-first": Tile(16, 64, 32, 4, 2, weights_first=True),
    "descriptors": Tile(64, 64, 64, 4, 2, descriptors=True),
    "descriptors-tail": Tile(128, 64, 64, 8, 2, descriptors=True, tail=64),
    "descriptors-persistent": Tile(64, 64, 64, 4, 2, descriptors=True, programs_per_sm=1),
    "descriptors-weights-first": Tile(16, 64, 64, 4, 3, descriptors=True, weights_first=True),
}


def tile_for(name: str, dtype: torch.dtype, device: torch.device) -> Tile:
    tile = TILES[name]
    if dtype == torch.float32 and tile.m > 32:
        pytest.skip("fp32 tiles have at most 32 rows")
    return bulk_copies(tile, device)


def permuted(topk_ids: Tensor, num_experts: int, tile_rows: int) -> Permutation:
    """As `permute` leaves it, with room for more tiles than there are, if there are any."""
    rows = permute_ref(topk_ids, num_experts, tile_rows)
    room = 5 if topk_ids.numel() else 0
    unwritten = rows.tiles.new_full((3, room), torch.iinfo(torch.int32).max)
    return rows._replace(tiles=torch.cat((rows.tiles, unwritten), 1))


def bulk_copies(tile: Tile, device: torch.device) -> Tile:
    """The tile, if the device can do what it asks for."""
    if tile.descriptors and device.type == "cuda" and capability(device) < (9, 0):
        pytest.skip("no bulk copy engine")
    return tile

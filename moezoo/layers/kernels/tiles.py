"""Tile sizes of the grouped matrix products, by rows per expert, dtype and the device's memory.

The tiles do not change what is computed, but the order in which a product is summed, so the last
bit of a 16-bit result may differ between token counts; for one token count it never does.
"""

from dataclasses import dataclass
from functools import cache

import torch

GROUP_M = 8
"""Row tiles that are worked on side by side, so that they find a weight tile in L2."""

INTERPRETER_SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def row_tile(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: about what an expert gets when the rows spread evenly.

    The two products of a layer share it, since they share the table of tiles.
    """
    largest = 32 if dtype == torch.float32 else 128
    rows_per_expert = -(-num_rows // num_experts)
    m = 16
    while m < largest and m < rows_per_expert:
        m *= 2
    return m


def choose_tile(m: int, num_outputs: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of a product with `num_outputs` weight matrices side by side (gate and up are two).

    fp32 products run on the ordinary cores, operands in registers: small tiles.
    """
    if dtype == torch.float32:
        n, k, num_warps = 32, 32, 4
    elif m <= 32:
        n, k, num_warps = 64 // num_outputs, 128, 4
    elif m == 64:
        n, k, num_warps = 128 // num_outputs, 64, 4
    else:
        n, k, num_warps = 256 // num_outputs, 64, 8
    stage_bytes = (m + n * num_outputs) * k * dtype.itemsize
    # One stage stays free for what the compiler itself puts into shared memory.
    num_stages = max(1, min(4, shared_memory(device) // stage_bytes - 1))
    return Tile(m, n, k, num_warps, num_stages)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin

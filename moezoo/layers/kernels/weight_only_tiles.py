"""Tiles of `weight_only`'s products: from the tables of `tiles`, or by the rows of an expert.

A block's k is in columns, of which 4-bit formats have two in a byte: what is best for them is best
with half of it for 8 bits.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from moezoo.layers.kernels.tiles import Plan, Sizes, Tile, can_describe, shared_memory, tuned
from moezoo.layers.quant.int4 import Int4
from moezoo.layers.quant.int8 import Int8
from moezoo.layers.quant.mxfp4 import Mxfp4


def plan_weight_only(
    x: Tensor,
    w13: Int8 | Int4 | Mxfp4,
    w2: Int8 | Int4 | Mxfp4,
    *,
    num_rows: int,
    num_experts: int | None = None,
) -> Plan:
    """The plan for num_rows rows of x [T, H] on w13 [E, 2 or 1, I, H] and w2 [E, H, I].

    num_experts is how many the rows are spread over, those of other ranks included; default E. The
    plan depends on shapes, strides, dtypes and device, never on what the router chose.
    """
    described = x.dtype.itemsize == 2 and can_describe(w13.data) and can_describe(w2.data)
    if not isinstance(w13, Int8):
        # The kernels read 16 bits at a time.
        described = described and w13.shape[-1] % 4 == w2.shape[-1] % 4 == 0
    else:
        described = described and w13.shape[-1] % 2 == w2.shape[-1] % 2 == 0
    rows_per_expert = num_rows / (num_experts or w13.shape[0])
    return _plan(x.device, x.dtype, w13.name, tuple(w13.shape), described, rows_per_expert)


@lru_cache(4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    shape: tuple[int, ...],
    described: bool,
    rows_per_expert: float,
) -> Plan:
    num_experts, num_parts, intermediate_size, hidden_size = shape
    sizes: Sizes = (num_experts, hidden_size, intermediate_size, name)
    bits = 8 if name == Int8.name else 4
    if dtype == torch.float32:
        tile = Tile(16 if rows_per_expert <= 16 else 32, 32, 64, 4, 2, weights_first=True)
        chosen = Plan(tile, tile)
    else:
        known = tuned(device, sizes, rows_per_expert) if described else None
        chosen = known or _by_rows(rows_per_expert, bits, described)
    return Plan(
        _fitted(chosen.gated_up, num_parts, bits, dtype.itemsize, device),
        _fitted(chosen.down, 1, bits, dtype.itemsize, device),
    )


def _by_rows(rows_per_expert: float, bits: int, described: bool) -> Plan:
    if rows_per_expert <= 24:
        m = 16 if rows_per_expert <= 10 else 32
        up, down = Tile(m, 64, 256, 8, 4), Tile(m, 128, 256, 8, 4)
    elif rows_per_expert <= 80:
        up, down = Tile(64, 64, 128, 8, 4), Tile(64, 128, 128, 8, 4)
    elif rows_per_expert <= 200:
        up, down = Tile(128, 64, 128, 8, 4, tail=64), Tile(128, 128, 128, 8, 4, tail=64)
    else:
        up, down = Tile(256, 64, 64, 8, 4, tail=128), Tile(256, 128, 64, 8, 4, tail=128)
    k = {8: 2, 4: 1}[bits]
    plan = Plan(*(replace(t, k=max(64, t.k // k), weights_first=True) for t in (up, down)))
    return Plan(*(replace(t, descriptors=described) for t in (plan.gated_up, plan.down)))


def _fitted(tile: Tile, num_parts: int, bits: int, itemsize: int, device: torch.device) -> Tile:
    """This tile with the stages that shared memory holds; where it holds none, k shrinks."""
    bits_per_column = 8 * itemsize * tile.m + bits * num_parts * tile.n
    # A little stays free for scales, for barriers and for what the compiler itself puts there.
    room = shared_memory(device) - 4096
    if tile.programs_per_sm and not tile.tail:
        # The finished tile goes through shared memory while the next ones arrive.
        room -= 32 * 1024
    k = tile.k
    while bits_per_column * k // 8 > room and k > 64:
        k //= 2
    stages = max(1, min(tile.num_stages, room * 8 // (bits_per_column * k)))
    return replace(tile, k=k, num_stages=stages)

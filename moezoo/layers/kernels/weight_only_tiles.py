"""Tiles of `gated_up_weight_only` and `down_weight_only`, from the tables of `tiles` or by rule.

A block's k is in columns, of which 4-bit formats have two in a byte. Rules and tables are measured
on one H100, those of integers without zero points, but for `_zeros_plan`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moezoo.layers.kernels.tiles import (
    Plan,
    Sizes,
    Tile,
    can_describe,
    remembered,
    tuned,
)
from moezoo.layers.quant import Mxfp4, WeightOnly

FAR = 2.0
"""Largest ratio of rows per expert at which one of the few measured plans beats the rule."""


def plan_weight_only(
    x: Tensor,
    w13: WeightOnly,
    w2: WeightOnly,
    *,
    num_rows: int,
    num_experts: int | None = None,
) -> Plan:
    """Return the plan for num_rows rows of x [T, H], w13 [E, 2 or 1, I, H] and w2 [E, H, I].

    The rows are spread over num_experts experts, those of other ranks included; by default E. The
    plan depends on shapes, strides, dtypes and device, never on what the router chose.
    """
    described = x.dtype.itemsize == 2 and can_describe(w13.data) and can_describe(w2.data)
    # The kernels read 16 bits at a time.
    described = described and all(w.shape[-1] % (16 // w.bits) == 0 for w in (w13, w2))
    rows_per_expert = num_rows / (num_experts or w13.shape[0])
    has_zeros = any(w.zeros is not None for w in (w13, w2))
    return _plan(
        *(x.device, x.dtype, w13.name, w13.bits, tuple(w13.shape)),
        has_zeros,
        described,
        rows_per_expert,
    )


@remembered
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    bits: int,
    shape: tuple[int, ...],
    has_zeros: bool,
    described: bool,
    rows_per_expert: float,
) -> Plan:
    num_experts, num_parts, intermediate_size, hidden_size = shape
    sizes: Sizes = (num_experts, hidden_size, intermediate_size, name)
    if dtype == torch.float32:
        tile = Tile(16 if rows_per_expert <= 16 else 32, 32, 64, 4, 2, weights_first=True)
        chosen = Plan(tile, tile)
    else:
        known = described and not has_zeros
        plan = tuned(device, sizes, rows_per_expert, far=FAR) if known else None
        if plan is None:
            if bits == 8:
                plan = _int8_plan(rows_per_expert)
            elif has_zeros:
                plan = _zeros_plan(rows_per_expert, described)
            elif name == Mxfp4.name:
                plan = _mxfp4_plan(rows_per_expert, described)
            else:
                plan = _int4_plan(rows_per_expert)
        chosen = Plan(*(replace(t, descriptors=described) for t in (plan.gated_up, plan.down)))
    return Plan(
        chosen.gated_up.fitted(num_parts, dtype.itemsize, device, bits=bits),
        chosen.down.fitted(1, dtype.itemsize, device, bits=bits),
    )


MANY = 200.0
"""Rows per expert from which the last tile is seldom so empty that a smaller one would pay."""


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int, tail: int = 0) -> Tile:
    return Tile(m, n, k, num_warps, num_stages, weights_first=True, tail=tail)


def _int4_plan(rows_per_expert: float) -> Plan:
    if rows_per_expert <= 0.25:
        # Few programs, so each asks for more ahead.
        return Plan(_tile(16, 32, 256, 4, 5), _tile(16, 128, 256, 4, 4))
    if rows_per_expert <= 10:
        return Plan(_tile(16, 32, 256, 4, 3), _tile(16, 128, 128, 4, 3))
    if rows_per_expert <= 48:
        return Plan(_tile(32, 64, 128, 4, 3), _tile(32, 128, 128, 4, 3))
    tail = 64 if rows_per_expert <= MANY else 0
    return Plan(_tile(128, 64, 128, 4, 3, tail), _tile(128, 128, 128, 4, 3, tail))


def _mxfp4_plan(rows_per_expert: float, described: bool) -> Plan:
    """Return large tiles, over which the work of unpacking is shared; it is more than int4's."""
    if rows_per_expert <= MANY or not described:
        return _int4_plan(rows_per_expert)
    return Plan(_tile(256, 64, 128, 8, 3, tail=128), _tile(256, 128, 128, 8, 3, tail=128))


def _zeros_plan(rows_per_expert: float, described: bool) -> Plan:
    """Return tiles for 4 bits with zero points.

    They take registers; with pointers as well, tiles of 256 rows would not fit.
    """
    if rows_per_expert <= 10:
        return Plan(_tile(16, 32, 128, 4, 6), _tile(16, 64, 128, 4, 6))
    if rows_per_expert <= 24:
        return Plan(_tile(32, 32, 128, 4, 5), _tile(32, 64, 256, 4, 4))
    if rows_per_expert <= 48:
        return Plan(_tile(64, 64, 256, 8, 3), _tile(64, 64, 128, 4, 4))
    if rows_per_expert <= MANY or not described:
        return Plan(_tile(128, 64, 128, 8, 3, tail=64), _tile(128, 256, 128, 8, 3))
    tail = 128 if rows_per_expert <= 500 else 0
    return Plan(_tile(256, 64, 128, 8, 3, tail=128), _tile(256, 128, 128, 8, 3, tail))


def _int8_plan(rows_per_expert: float) -> Plan:
    """Return tiles for 8 bits; they have the registers for zero points too."""
    if rows_per_expert <= 10:
        return Plan(_tile(16, 32, 128, 4, 3), _tile(16, 64, 256, 4, 3))
    if rows_per_expert <= 24:
        return Plan(_tile(32, 32, 128, 4, 3), _tile(32, 64, 128, 4, 3))
    if rows_per_expert <= 48:
        return Plan(_tile(64, 32, 64, 4, 4), _tile(64, 64, 64, 4, 4))
    tail = 64 if rows_per_expert <= MANY else 0
    return Plan(_tile(128, 64, 64, 4, 3, tail), _tile(128, 128, 64, 4, 3, tail))

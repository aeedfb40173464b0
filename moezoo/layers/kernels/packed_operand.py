"""Weights of 4 and 8 bits in the layout that `gated_up_weight_only` and `down_weight_only` read.

Rounding points of both: with tiles of up to FEW_ROWS rows integers are exact in the products, and
their sums over a group of columns are scaled in fp32. With more rows scales are rounded to x's
dtype, and so are weights times scales; sums with a scale per row stay as they were. mxfp4's weights
are exact (in fp16, as far as it holds them). Sums are fp32, h and y are rounded once.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moezoo.layers.kernels.overlap import capability, launch_options
from moezoo.layers.kernels.packed_products import num_slices
from moezoo.layers.kernels.tiles import FEW_ROWS, Tile
from moezoo.layers.kernels.unpack import CHUNK
from moezoo.layers.quant import Int4, Int8, Mxfp4, WeightOnly
from moezoo.layers.quant.mxfp4 import GROUP

FORMATS: dict[type, str] = {Int8: "int8", Int4: "int4", Mxfp4: "mxfp4"}
"""Names by which the kernels know the formats."""


def ways(weights: type[WeightOnly], num_columns: int) -> int:
    """Return the columns in a word of weights: of 16 bits, or of 8 where those do not fit."""
    in_a_byte = 8 // weights.bits
    return in_a_byte if num_columns % (2 * in_a_byte) else 2 * in_a_byte


def in_order(x: Tensor, weights: type[WeightOnly], num_columns: int) -> Tensor:
    """Undo `interleave`: return the columns in their usual order, without padding."""
    return x.unflatten(-1, (-1, ways(weights, num_columns), CHUNK.value)).mT.flatten(-3)[
        :, :num_columns
    ]


class Packed(NamedTuple):
    """Weights in the kernels' layout: words [E, P, N, W], scales and zeros [E, P, N, G]."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    options: dict[str, Any]


def unpacks_pairs(x: Tensor) -> bool:
    """Whether x's GPU has instructions on pairs of x's dtype; before Hopper not of bf16."""
    if not x.is_cuda or torch.version.hip is not None or x.dtype.itemsize != 2:
        return False
    return x.dtype == torch.float16 or capability(x.device) >= (9, 0)


def packed_operand(name: str, w: WeightOnly, x: Tensor, tile: Tile) -> Packed:
    """Return w, which has four dimensions, in the kernels' layout for x's dtype.

    Raises ValueError for weights that the kernels do not read.
    """
    if w.order is not None:
        raise ValueError(f"{name} has its columns in an order of its own: dequantize() it")
    zeros = w.zeros
    num_columns = w.shape[-1]
    num_ways = ways(type(w), num_columns)
    words = w.data
    if num_ways * w.bits == 16:
        step = 2 * words.element_size()
        if words.data_ptr() % step or any(s % step for s in words.stride()[:-1]):
            raise ValueError(f"rows of {name}'s data must begin at even bytes, {words.stride()}")
        words = words.view(torch.int16)
    tensors = {"data": words, "scales": w.scales} | ({} if zeros is None else {"zeros": zeros})
    for field, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s {field} must have dense rows, got {tensor.stride()}")
    if zeros is not None and zeros.stride() != w.scales.stride():
        raise ValueError(
            f"{name}'s zeros must have the strides of its scales, got {zeros.stride()} and "
            f"{w.scales.stride()}"
        )
    mxfp4 = isinstance(w, Mxfp4)
    group = GROUP if mxfp4 else 0 if w.scales.shape[-1] == 1 else w.group_size
    group, block_words, chain = group // num_ways, tile.k // num_ways, tile.m > FEW_ROWS
    options = {
        "FORMAT": FORMATS[type(w)],
        "WAYS": num_ways,
        "HAS_ZEROS": zeros is not None,
        "GROUP": group,
        "SCALES_ALIGNED": gcd(16, *w.scales.stride()[:-1]) if mxfp4 else 1,
        "SLICES": num_slices(block_words, group, mxfp4=mxfp4, zeros=zeros is not None, chain=chain),
        "CHAIN": chain,
        # Four warps that work on 128 rows have no registers left for that.
        "SCALES_AT_ONCE": tile.num_warps > 4,
        "DESCRIPTORS": tile.descriptors,
        "EVEN_K": num_columns % tile.k == 0,
        "PAIRS": words.dtype == torch.int16 and unpacks_pairs(x),
        "DIRECT": tile.direct,
        "FLATTEN": tile.flattened,
        "GROUP_M": tile.group_m,
        "TAIL": tile.tail,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_W": block_words,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **launch_options(x.device, persistent=tile.persistent),
    }
    return Packed(words, w.scales, zeros, options)

"""Quantised weights: a format is a dataclass over tensors, and its `dequantize` defines it."""

from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.format import Format
from moezoo.layers.quant.fp8 import BlockFp8
from moezoo.layers.quant.int4 import Int4
from moezoo.layers.quant.int8 import Int8
from moezoo.layers.quant.integers import Integers
from moezoo.layers.quant.mxfp4 import Mxfp4
from moezoo.layers.quant.weights import QuantizedWeights

__all__ = [
    "FORMATS",
    "BlockFp8",
    "ChannelFp8",
    "Format",
    "Fp8Weights",
    "Int4",
    "Int8",
    "Integers",
    "Mxfp4",
    "QuantizedWeights",
    "WeightOnly",
]

FORMATS: dict[str, type[Format]] = {
    "block_fp8": BlockFp8,
    "channel_fp8": ChannelFp8,
    "int8": Int8,
    "int4": Int4,
    "mxfp4": Mxfp4,
}
"""Formats by the name of their operators, such as `moezoo::linear_int4`."""

WeightOnly = Int8 | Int4 | Mxfp4
"""Formats of weights that are multiplied by activations in 16 or 32 bits."""

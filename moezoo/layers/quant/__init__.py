"""Quantised weights: a format is a dataclass over tensors, and its `dequantize` defines it."""

from moezoo.layers.quant.fp8 import BlockFp8, BlockFp8Weights

__all__ = ["BlockFp8", "BlockFp8Weights"]

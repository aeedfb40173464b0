"""fp8_w8a8 with an fp32 scale per row of weights, or per matrix.

    w[n, k] = data[n, k] * scales[n]

A scale per matrix is held as the same number for each of its rows. Activations are quantised as
beside blocks, per token and 128 of K: finer than per token, so a checkpoint's static scale of them
is of no use. Quantising is as for blocks, see `fp8`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moezoo.formats import FP8
from moezoo.layers.quant.format import (
    Format,
    by_rows,
    magnitudes,
    require_data,
    require_weights,
)
from moezoo.layers.quant.fp8 import BlockFp8, scaled, widened


@dataclass(frozen=True, eq=False)
class ChannelFp8(Format):
    """Weights in fp8 with a scale per row: data [.., N, K] float8_e4m3fn, scales [.., N] fp32."""

    name: ClassVar[str] = FP8
    unit: ClassVar[str] = "row"
    quantizes_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_data(self.data, "[.., N, K]", torch.float8_e4m3fn)
        self._require("scales", self.shape[:-1], torch.float32)

    @classmethod
    def quantize_unchecked(
        cls, w: Tensor, *, granularity: Literal["channel", "tensor"] = "channel"
    ) -> "ChannelFp8":
        """Quantise w with a scale per row, or with granularity "tensor" per matrix [N, K].

        Raises ValueError for another one.
        """
        require_weights(w)
        if granularity not in ("channel", "tensor"):
            raise ValueError(
                f"granularity is {granularity!r}, expected 'channel' or 'tensor'; blocks are "
                "BlockFp8's"
            )
        largest = magnitudes(w, -1 if granularity == "channel" else (-2, -1))

        def quantize(rows: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
            return scaled(rows.float(), largest.float())

        data, scales = by_rows(quantize, w, largest.expand(*w.shape[:-1], 1))
        return cls(data, scales.squeeze(-1))

    @classmethod
    def on_meta(cls, *shape: int) -> "ChannelFp8":
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        return cls(data, torch.empty(shape[:-1], dtype=torch.float32, device="meta"))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (widened(self.data) * self.scales.unsqueeze(-1)).to(dtype)


Fp8Weights = BlockFp8 | ChannelFp8
"""Formats that are multiplied by activations quantised to fp8."""

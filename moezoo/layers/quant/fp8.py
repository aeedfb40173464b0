"""fp8_w8a8 in blocks: float8_e4m3fn with an fp32 scale for 128 x 128 weights, or 128 activations.

    w[n, k] = data[n, k] * scales[n // 128, k // 128]
    x[t, k] = data[t, k] * scales[t, k // 128]

Quantising, a scale is the largest magnitude of its block over 448, and data are the values times
448 over that magnitude, rounded to nearest even: both computed in fp32. The last block of a
dimension may be smaller. DeepSeek-V3's checkpoints and the FP8 ones of Qwen3 store weights so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moezoo.device import multiplies_fp8
from moezoo.errors import QuantizationError
from moezoo.formats import FP8
from moezoo.layers.quant.format import TINY, Format, require_data, require_weights, rows_at_a_time

BLOCK = 128
"""Rows and columns of a block of weights, and activations per group."""

LARGEST = 448.0
"""Largest finite number in float8_e4m3fn."""

FOR_EXPERTS = (
    "for experts take a checkpoint that is not quantised, as it is or with quantization="
    "'int8_w8a16' or 'int4_w4a16'"
)
FOR_LINEARS = "load the model with quantization={'dense': 'dequantize'}"
"""What a user can do on a GPU that does not multiply fp8."""

_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, eq=False)
class BlockFp8(Format):
    """Weights in fp8 with a scale per block: data [.., N, K] float8_e4m3fn and scales fp32 [..,
    ceil(N/128), ceil(K/128)]."""

    name: ClassVar[str] = FP8
    unit: ClassVar[str] = "block"
    scale_layout: ClassVar[str] = f"in blocks of {BLOCK} x {BLOCK}"
    quantizes_activations: ClassVar[bool] = True
    rows_per_scale: ClassVar[int] = BLOCK

    def __post_init__(self) -> None:
        require_data(self.data, "[.., N, K]", torch.float8_e4m3fn)
        self._require("scales", scales_shape(self.shape), torch.float32)

    @classmethod
    def quantize_unchecked(cls, w: Tensor) -> "BlockFp8":
        require_weights(w)
        matrices = w.reshape(-1, *w.shape[-2:])
        data = matrices.new_empty(matrices.shape, dtype=torch.float8_e4m3fn)
        scales = matrices.new_empty(scales_shape(matrices.shape), dtype=torch.float32)
        for some, rows in rows_at_a_time(matrices, multiple=BLOCK):
            of_blocks = slice(rows.start // BLOCK, blocks(rows.stop))
            data[some, rows], scales[some, of_blocks] = _in_blocks(matrices[some, rows].float())
        return cls(data.view(w.shape), scales.view(scales_shape(w.shape)))

    @classmethod
    def on_meta(cls, *shape: int) -> "BlockFp8":
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        return cls(data, torch.empty(scales_shape(shape), dtype=torch.float32, device="meta"))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        n, k = self.shape[-2:]
        groups = F.pad(widened(self.data), (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
        scales = self.scales.repeat_interleave(BLOCK, -2)[..., :n, :].unsqueeze(-1)
        return (groups * scales).flatten(-2)[..., :k].to(dtype)

    def rows(self, start: int, stop: int) -> "BlockFp8":
        assert start % BLOCK == 0, start
        scales = self.scales[start // BLOCK : blocks(stop)]
        return BlockFp8(self.data[start:stop], scales)

    def in_parts(self, parts: int) -> "BlockFp8":
        """Return weights [.., parts * N, K] as [.., parts, N, K]. Raises ValueError unless 128
        divides N, as parts would share blocks."""
        rows, k = self.shape[-2:]
        if rows % (parts * BLOCK):
            raise ValueError(
                f"BlockFp8 {list(self.shape)} has blocks that its {parts} parts share; give "
                f"{[*self.shape[:-2], parts, rows // parts, k]}, with scales of each part's own"
            )
        return super().in_parts(parts)


def _in_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and scales of w [M, N, K] fp32."""
    _, n, k = w.shape
    padded = F.pad(w, (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    data, scales = scaled(tiles, tiles.abs().amax((-3, -1), keepdim=True))
    return data.flatten(-4, -3).flatten(-2)[..., :n, :k], scales.squeeze(-1).squeeze(-2)


class Fp8Rows(NamedTuple):
    """Activations: data [T, P] float8_e4m3fn, P the least multiple of 128 from K on, and scales
    [T, P / 128] fp32 of any strides. What data hold from K on is zero."""

    data: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """Return the activations [T, P] in fp32."""
        groups = widened(self.data).unflatten(-1, (-1, BLOCK))
        return (groups * self.scales.unsqueeze(-1)).flatten(-2)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Quantise x [T, K], of any floating dtype. NaN and Inf make their whole group NaN (in the
    kernel that does the same, only the NaN itself)."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    data, scales = scaled(groups, groups.abs().amax(-1, keepdim=True))
    return Fp8Rows(data.flatten(-2), scales.squeeze(-1))


def row_bytes(width: int) -> int:
    """Return the bytes of a row of `width` quantised activations with its scales."""
    return blocks(width) * (BLOCK + 4)


def widened(data: Tensor) -> Tensor:
    """Return data float8_e4m3fn in fp32; on a CPU torch's own conversion takes six times as
    long."""
    if not data.is_cpu:
        return data.float()
    return _VALUES.index_select(0, data.view(torch.uint8).flatten().int()).view(data.shape)


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of weights [.., N, K]."""
    return (*shape[:-2], blocks(shape[-2]), blocks(shape[-1]))


def scaled(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return x fp32 in float8_e4m3fn, and the scales with which `largest` becomes 448."""
    largest = largest.clamp(min=TINY)
    # With a number in place of `full`, torch would multiply by a rounded reciprocal.
    full = torch.full_like(largest, LARGEST)
    return (x * (full / largest)).to(torch.float8_e4m3fn), largest / full


def require_fp8(device: torch.device, instead: str) -> None:
    """Raises QuantizationError, with what to do `instead`, for a GPU that does not multiply fp8."""
    if not multiplies_fp8(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise QuantizationError(
            f"{FP8} needs a GPU of compute capability 8.9 or later, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}; {instead}"
        )

"""fp8_w8a8 in blocks: float8_e4m3fn with an fp32 scale for 128 x 128 weights, or 128 activations.

    w[n, k] = data[n, k] * scales[n // 128, k // 128]
    x[t, k] = data[t, k] * scales[t, k // 128]

Quantising, a scale is the largest magnitude of its block over 448, and data are the values times
448 over that magnitude, rounded to nearest even: both computed in fp32. The last block of a
dimension may be smaller. DeepSeek-V3's checkpoints and the FP8 ones of Qwen3 store weights so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.errors import QuantizationError

BLOCK_FP8 = "fp8_w8a8"
"""The name of the format, in options and tables."""

BLOCK = 128
"""Rows and columns of a block of weights, activations of a group."""

LARGEST = 448.0
"""float8_e4m3fn holds nothing larger."""

TINY = 1e-30
"""The least magnitude of a block that counts: the scale of a block of zeros stays normal."""

_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class BlockFp8:
    """data [.., N, K] float8_e4m3fn, scales [.., ceil(N/128), ceil(K/128)] fp32; dimensions before
    are matrices of their own, as w13's gate and up are.

    Raises QuantizationError for shapes, dtypes or devices that do not belong together.
    """

    data: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        data, scales = self.data, self.scales
        if data.dtype != torch.float8_e4m3fn or data.ndim < 2:
            raise QuantizationError(
                f"data must be [.., N, K] float8_e4m3fn, got {list(data.shape)} {data.dtype}"
            )
        expected = list(scales_shape(data.shape))
        found = (list(scales.shape), scales.dtype, scales.device)
        if found != (expected, torch.float32, data.device):
            raise QuantizationError(
                f"scales of data {list(data.shape)} must be {expected} torch.float32 on "
                f"{data.device}, got {found[0]} {found[1]} on {found[2]}"
            )

    @classmethod
    def quantize(cls, w: Tensor) -> "BlockFp8":
        """w [.., N, K], floating point of any kind.

        Raises QuantizationError where w holds NaN or Inf.
        """
        quantized = cls.quantize_unchecked(w)
        quantized.check_values()
        return quantized

    @classmethod
    def quantize_unchecked(cls, w: Tensor) -> "BlockFp8":
        """The same without a look at the values: NaN and Inf in w are left to `check_values`."""
        if not w.is_floating_point() or w.ndim < 2:
            raise QuantizationError(
                f"weights must be [.., N, K] floating point, got {list(w.shape)} {w.dtype}"
            )
        n, k = w.shape[-2:]
        padded = F.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
        tiles = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        data, scales = _quantize(tiles, (-3, -1))
        data = data.flatten(-4, -3).flatten(-2)[..., :n, :k].contiguous()
        return cls(data, scales.squeeze(-1).squeeze(-2))

    @classmethod
    def on_meta(cls, *shape: int) -> "BlockFp8":
        """Of this shape [.., N, K], without memory or values."""
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        return cls(data, torch.empty(scales_shape(shape), dtype=torch.float32, device="meta"))

    def check_values(self, name: str = "weights") -> None:
        """Raises QuantizationError for a scale that is NaN, Inf, zero or negative.

        It looks at the values, so on a GPU it waits for them.
        """
        place = wrong_scale(self.scales)
        if place is not None:
            raise QuantizationError(
                f"{name}: the scale of block {place} is {self.scales[tuple(place)].item()}, "
                "it must be finite and positive"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        n, k = self.data.shape[-2:]
        groups = F.pad(_float(self.data), (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
        scales = self.scales.repeat_interleave(BLOCK, -2)[..., :n, :].unsqueeze(-1)
        return (groups * scales).flatten(-2)[..., :k].to(dtype)

    def __getitem__(self, index: int) -> "BlockFp8":
        return BlockFp8(self.data[index], self.scales[index])

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


class BlockFp8Weights(nn.Module):
    """A `BlockFp8` as a module holds it: parameters `data` and `scales`, which need no gradient.

    A cast of the model to another dtype leaves both as they are.
    """

    keep_dtype: ClassVar[tuple[str, ...]] = ("data", "scales")

    def __init__(self, weights: BlockFp8) -> None:
        super().__init__()
        self.data = nn.Parameter(weights.data, requires_grad=False)
        self.scales = nn.Parameter(weights.scales, requires_grad=False)

    def forward(self) -> BlockFp8:
        return BlockFp8(self.data, self.scales)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {BLOCK_FP8}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockFp8Weights":
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self


class Fp8Rows(NamedTuple):
    """Activations: data [T, P] float8_e4m3fn, P the least multiple of 128 from K on, and scales
    [T, P / 128] fp32 of any strides. What data hold from K on is zero."""

    data: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """-> [T, P] fp32."""
        groups = _float(self.data).unflatten(-1, (-1, BLOCK))
        return (groups * self.scales.unsqueeze(-1)).flatten(-2)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x [T, K], floating point. NaN and Inf make their group NaN (in the kernel that does the same,
    NaN stays alone)."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % BLOCK))
    data, scales = _quantize(padded.unflatten(-1, (-1, BLOCK)), (-1,))
    return Fp8Rows(data.flatten(-2), scales.squeeze(-1))


def _float(data: Tensor) -> Tensor:
    """data float8_e4m3fn in fp32; on a CPU torch's own conversion takes six times as long."""
    if not data.is_cpu:
        return data.float()
    return _VALUES.index_select(0, data.view(torch.uint8).flatten().int()).view(data.shape)


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of weights [.., N, K]."""
    return (*shape[:-2], blocks(shape[-2]), blocks(shape[-1]))


def wrong_scale(scales: Tensor) -> list[int] | None:
    """The index of the first that is NaN, Inf, zero or negative; it waits for the GPU."""
    wrong = ~((scales > 0) & scales.isfinite())
    first: list[int] | None = wrong.nonzero()[0].tolist() if wrong.any() else None
    return first


def _quantize(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Over `dims` of x, which the scales keep with size 1."""
    largest = x.abs().amax(dims, keepdim=True).clamp(min=TINY)
    # With a number in place of `full`, torch would multiply by a rounded reciprocal.
    full = torch.full_like(largest, LARGEST)
    return (x * (full / largest)).to(torch.float8_e4m3fn), largest / full

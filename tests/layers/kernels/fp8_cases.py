"""Weights, tiles and closeness for the tests of the fp8 kernels."""

import torch

from moezoo.layers.kernels.tiles import Tile
from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.fp8 import LARGEST, BlockFp8, Fp8Rows

# Every way through the kernels; GPUs have no fp8 product of fewer than 16 rows.
TILES = {
    "plain": Tile(16, 128, 128, 4, 2),
    "many": Tile(128, 128, 128, 8, 2),
    "tail": Tile(64, 128, 128, 8, 2, tail=16),
    "persistent": Tile(16, 128, 128, 4, 2, programs_per_sm=1, group_m=2),
    "weights-first": Tile(16, 128, 128, 4, 2, weights_first=True),
    "descriptors": Tile(64, 128, 128, 8, 2, descriptors=True),
    "descriptors-tail": Tile(128, 128, 128, 8, 2, descriptors=True, tail=64),
    "descriptors-persistent": Tile(64, 128, 128, 8, 2, descriptors=True, programs_per_sm=1),
    "descriptors-weights-first": Tile(16, 128, 128, 4, 3, descriptors=True, weights_first=True),
}

SIZES = [(48, 32), (400, 144)]
"""(H, I), the bulk copy engine's multiples of 16 but not the format's 128."""

ROUTINGS = ["one-token", "odd", "few-of-many", "no-tokens", "all-on-one", "absent"]


FORMATS = [BlockFp8, ChannelFp8]


def weights(
    *shape: int, device: torch.device, seed: int = 0, format_: type[Fp8Weights] = BlockFp8
) -> Fp8Weights:
    """Blocks or rows of very different sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
    quantized = format_.quantize(w.to(device))
    factors = torch.rand(quantized.scales.shape, generator=generator) * 1.75 + 0.25
    return format_(quantized.data, quantized.scales * factors.to(device))


def assert_rows_close(actual: Fp8Rows, expected: Fp8Rows) -> None:
    """A value within a step of fp8 (an eighth of it), and all but 2 % equal.

    Hopper's fp8 instructions cut products to 13 bits of fraction, all downwards: values before
    quantising may differ by 2^-9 of the largest where they are small, scales by 2^-9 of themselves.
    """
    assert actual.data.shape == expected.data.shape
    assert actual.scales.shape == expected.scales.shape
    torch.testing.assert_close(actual.scales, expected.scales, rtol=2e-3, atol=0)
    a, b = actual.data.float(), expected.data.float()
    excess = ((a - b).abs() - b.abs() / 7).max().item() if a.numel() else 0.0
    assert excess <= LARGEST * 2**-9, f"{excess / LARGEST:.2e} of the largest beyond a step"
    assert (a != b).sum() <= 0.02 * a.numel()

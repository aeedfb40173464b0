import re
from dataclasses import replace

import pytest
import torch
from tolerances import assert_close

from kernels.fp8_cases import FORMATS, SIZES, TILES, weights
from kernels.routings import ROUTINGS as SHAPES
from kernels.routings import topk_ids
from kernels.tile_cases import bulk_copies, permuted
from moezoo.layers.kernels.down_fp8 import down_fp8, down_fp8_ref
from moezoo.layers.kernels.permute import permute_ref
from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.fp8 import Fp8Rows, quantize_rows


def rows_of(num_rows: int, intermediate: int, device: torch.device) -> Fp8Rows:
    h = torch.randn(num_rows, intermediate, generator=torch.Generator().manual_seed(1))
    data, scales = quantize_rows(h.to(device))
    return Fp8Rows(data, scales.mT.contiguous().mT)


@pytest.mark.parametrize(("hidden", "intermediate"), SIZES, ids=str)
@pytest.mark.parametrize("routing", ["odd", "few-of-many", "no-tokens", "absent"])
@pytest.mark.parametrize(
    ("name", "width"),
    [*((name, 128) for name in TILES), *((name, 256) for name in TILES), ("weights-first", 64)],
)
@pytest.mark.usefixtures("fp8")
@pytest.mark.sampled(n=12)
def test_matches_reference(
    name: str, width: int, routing: str, hidden: int, intermediate: int, device: torch.device
) -> None:
    tile = replace(bulk_copies(TILES[name], device), n=width)
    num_tokens, k, num_experts = SHAPES[routing]
    h = rows_of(num_tokens * k, intermediate, device)
    w2 = weights(num_experts, hidden, intermediate, device=device)
    rows = permuted(topk_ids(routing).to(device), num_experts, tile.m)
    end = int(rows.offsets[-1])
    # Rows of absent experts were never written.
    h.data[end:] = torch.nan
    h.scales[end:] = torch.nan
    y = down_fp8(h, w2, rows, dtype=torch.float16, tile=tile)
    assert_close(y[:end], down_fp8_ref(h, w2, rows, dtype=torch.float16)[:end])
    assert torch.equal(y[:end], down_fp8(h, w2, rows, dtype=torch.float16, tile=tile)[:end])


@pytest.mark.parametrize(("hidden", "intermediate"), SIZES, ids=str)
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("name", TILES)
@pytest.mark.usefixtures("fp8")
@pytest.mark.sampled(n=3)
def test_scales_of_rows(
    name: str, width: int, hidden: int, intermediate: int, device: torch.device
) -> None:
    tile = replace(bulk_copies(TILES[name], device), n=width)
    h = rows_of(189, intermediate, device)
    w2 = weights(7, hidden, intermediate, device=device, format_=ChannelFp8)
    rows = permuted(topk_ids("odd").to(device), 7, tile.m)
    y = down_fp8(h, w2, rows, dtype=torch.float16, tile=tile)
    assert_close(y, down_fp8_ref(h, w2, rows, dtype=torch.float16))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.usefixtures("fp8")
def test_bias_and_strides(width: int, format_: type[Fp8Weights], device: torch.device) -> None:
    h, w2 = rows_of(189, 144, device), weights(7, 200, 144, device=device, format_=format_)
    bias2 = torch.randn(7, 200, generator=torch.Generator().manual_seed(2)).to(device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    strided = format_(w2.data.mT.contiguous().mT, w2.scales.mT.contiguous().mT)
    settings = {"dtype": torch.float16, "bias2": bias2, "tile": replace(TILES["plain"], n=width)}
    expected = down_fp8_ref(h, w2, rows, **settings)
    assert_close(down_fp8(h, strided, rows, **settings), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": rows_of(188, 48, torch.device("cpu"))}, "h must be [189, 128] with scales [189, 1]"),
        ({"h": rows_of(189, 300, torch.device("cpu"))}, "h must be [189, 128]"),
        ({"w2": weights(6, 40, 48, device=torch.device("cpu"))}, "offsets must be [7], got [8]"),
        ({"bias2": torch.zeros(7, 48)}, "bias2 must be [7, 40]"),
        ({"tile": replace(TILES["plain"], k=64)}, "tile.k must be 128"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    cpu = torch.device("cpu")
    arguments = {
        "h": rows_of(189, 48, cpu),
        "w2": weights(7, 40, 48, device=cpu),
        "permutation": permute_ref(topk_ids("odd"), 7, 16),
        "dtype": torch.float32,
        "tile": TILES["plain"],
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        down_fp8(**(arguments | change))

import re

import pytest
import torch

from kernels.fp8_cases import FORMATS, ROUTINGS, SIZES, TILES, assert_rows_close, weights
from kernels.routings import ROUTINGS as SHAPES
from kernels.routings import topk_ids
from kernels.tile_cases import bulk_copies, permuted
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.kernels.gated_up_fp8 import gated_up_fp8, gated_up_fp8_ref
from moezoo.layers.quant.channel_fp8 import ChannelFp8, Fp8Weights
from moezoo.layers.quant.fp8 import Fp8Rows, quantize_rows


def tokens(num_tokens: int, hidden: int, device: torch.device) -> Fp8Rows:
    x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(1))
    return quantize_rows(x.to(device))


def valid(h: Fp8Rows, num_rows: int) -> Fp8Rows:
    return Fp8Rows(h.data[:num_rows], h.scales[:num_rows])


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", TILES)
@pytest.mark.sampled(n=12)
def test_matches_reference(
    name: str, routing: str, hidden: int, intermediate: int, device: torch.device
) -> None:
    tile = bulk_copies(TILES[name], device)
    num_tokens, k, num_experts = SHAPES[routing]
    x = tokens(num_tokens, hidden, device)
    w13 = weights(num_experts, 2, intermediate, hidden, device=device)
    rows = permuted(topk_ids(routing).to(device), num_experts, tile.m)
    h = gated_up_fp8(x, w13, rows, k=k, tile=tile)
    end = int(rows.offsets[-1])
    assert_rows_close(valid(h, end), valid(gated_up_fp8_ref(x, w13, rows, k=k), end))
    again = gated_up_fp8(x, w13, rows, k=k, tile=tile)
    assert torch.equal(valid(h, end).dequantize(), valid(again, end).dequantize())


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES, ids=str)
@pytest.mark.parametrize("name", TILES)
@pytest.mark.sampled(n=3)
def test_scales_of_rows(name: str, hidden: int, intermediate: int, device: torch.device) -> None:
    tile, x = bulk_copies(TILES[name], device), tokens(63, hidden, device)
    w13 = weights(7, 2, intermediate, hidden, device=device, format_=ChannelFp8)
    rows = permuted(topk_ids("odd").to(device), 7, tile.m)
    h = gated_up_fp8(x, w13, rows, k=3, tile=tile)
    assert_rows_close(h, gated_up_fp8_ref(x, w13, rows, k=3))


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("gating", ["gelu", Gating("quick_gelu", limit=0.5, up_offset=1.0)])
def test_gatings_biases_and_strides(
    gating: str | Gating, weights_first: bool, format_: type[Fp8Weights], device: torch.device
) -> None:
    x, w13 = tokens(63, 144, device), weights(7, 2, 48, 144, device=device, format_=format_)
    bias13 = torch.randn(7, 2, 48, generator=torch.Generator().manual_seed(2)).to(device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    tile = TILES["weights-first" if weights_first else "plain"]
    strided = format_(w13.data.mT.contiguous().mT, w13.scales.mT.contiguous().mT)
    settings = {"k": 3, "tile": tile, "activation": gating, "bias13": bias13}
    expected = gated_up_fp8_ref(x, w13, rows, **settings)
    assert_rows_close(gated_up_fp8(x, strided, rows, **settings), expected)


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("format_", FORMATS)
def test_without_a_gate(format_: type[Fp8Weights], device: torch.device) -> None:
    x, w13 = tokens(63, 144, device), weights(7, 1, 48, 144, device=device, format_=format_)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    settings = {"k": 3, "tile": TILES["plain"], "activation": "relu2"}
    expected = gated_up_fp8_ref(x, w13, rows, **settings)
    assert_rows_close(gated_up_fp8(x, w13, rows, **settings), expected)


@pytest.mark.usefixtures("fp8")
def test_nan_stays_in_its_row(device: torch.device) -> None:
    x = torch.randn(63, 144, generator=torch.Generator().manual_seed(1))
    x[4, 7] = torch.nan
    w13 = weights(7, 2, 48, 144, device=device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    h = gated_up_fp8(quantize_rows(x.to(device)), w13, rows, k=3, tile=TILES["plain"]).dequantize()
    assert torch.equal(h[:, :48].isnan().all(-1), rows.order // 3 == 4)
    assert torch.equal(h.isnan().any(-1), rows.order // 3 == 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": tokens(63, 300, torch.device("cpu"))}, "x must be [T, 128] with scales [T, 1]"),
        ({"k": 2}, "order must be [126]"),
        ({"tile": TILES["plain"].__class__(16, 64, 128, 4, 2)}, "tile.n and tile.k must be 128"),
        ({"bias13": torch.zeros(7, 96)}, "bias13 must be [7, 2, 48]"),
        ({"w13": weights(7, 96, 48, device=torch.device("cpu"))}, "w13 must be [E, 2 or 1, I, H]"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    cpu = torch.device("cpu")
    rows = permuted(topk_ids("odd"), 7, 16)
    arguments = {
        "x": tokens(63, 48, cpu),
        "w13": weights(7, 2, 48, 48, device=cpu),
        "permutation": rows,
        "k": 3,
        "tile": TILES["plain"],
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_up_fp8(**(arguments | change))

import re

import pytest
import torch
from tolerances import assert_close

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.down import down, down_ref
from moezoo.layers.kernels.permute import permute_ref


def inputs(
    routing: str, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, k, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(num_tokens * k, intermediate, generator=generator)
    w2 = torch.randn(num_experts, hidden, intermediate, generator=generator) * intermediate**-0.5
    return h.to(device, dtype), w2.to(device, dtype)


@pytest.mark.parametrize(("hidden", "intermediate"), [(40, 24), (72, 256)], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_matches_reference(
    routing: str, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> None:
    h, w2 = inputs(routing, hidden, intermediate, dtype, device)
    ids = topk_ids(routing).to(device)
    tiles = permute_ref(ids, ROUTINGS[routing][2], 16)
    # Rows of absent experts were never written.
    h[tiles[1][-1] :] = torch.nan
    present = ids.flatten() >= 0
    result = down(h, w2, *tiles, tile_rows=16)
    assert_close(result[present], down_ref(h, w2, *tiles, tile_rows=16)[present])


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
def test_larger_tiles(tile_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.float32 and tile_rows > 32:
        pytest.skip("fp32 tiles have at most 32 rows")
    h, w2 = inputs("all-on-one", 72, 40, dtype, device)
    tiles = permute_ref(topk_ids("all-on-one").to(device), 3, tile_rows)
    result = down(h, w2, *tiles, tile_rows=tile_rows)
    assert_close(result, down_ref(h, w2, *tiles, tile_rows=tile_rows))


def test_bias_and_strided_weights(device: torch.device) -> None:
    h, w2 = inputs("odd", 40, 24, torch.float32, device)
    bias2 = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).to(device)
    tiles = permute_ref(topk_ids("odd").to(device), 7, 16)
    result = down(h, w2.mT.contiguous().mT, *tiles, tile_rows=16, bias2=bias2)
    assert_close(result, down_ref(h, w2, *tiles, tile_rows=16, bias2=bias2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(189, 25)}, "h must be [189, 24]"),
        ({"h": torch.zeros(188, 24)}, "h must be [189, 24]"),
        ({"h": torch.zeros(189, 24).half()}, "h must be [189, 24] torch.float32"),
        ({"h": torch.zeros(24, 189).mT}, "h must be contiguous"),
        ({"offsets": torch.zeros(7, dtype=torch.int32)}, "offsets must be [8], got [7]"),
        ({"bias2": torch.zeros(7, 24)}, "bias2 must be [7, 40], got [7, 24]"),
    ],
)
def test_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    h, w2 = inputs("odd", 40, 24, torch.float32, torch.device("cpu"))
    order, offsets, tile_experts = permute_ref(topk_ids("odd"), 7, 16)
    arguments = {
        "h": h,
        "w2": w2,
        "order": order,
        "offsets": offsets,
        "tile_experts": tile_experts,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        down(**(arguments | change), tile_rows=16)

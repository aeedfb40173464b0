import re

import pytest
import torch
from tolerances import assert_close

from kernels.routings import ROUTINGS, topk_ids
from kernels.tile_cases import TILES, permuted, tile_for
from moezoo.layers.kernels.down import down, down_ref


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
@pytest.mark.parametrize("name", TILES)
@pytest.mark.sampled(n=10)
def test_matches_reference(
    name: str,
    routing: str,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tile = tile_for(name, dtype, device)
    h, w2 = inputs(routing, hidden, intermediate, dtype, device)
    rows = permuted(topk_ids(routing).to(device), ROUTINGS[routing][2], tile.m)
    valid = int(rows.offsets[-1])
    # Rows of absent experts were never written.
    h[valid:] = torch.nan
    assert_close(down(h, w2, rows, tile=tile)[:valid], down_ref(h, w2, rows)[:valid])


def test_bias_and_strided_weights(device: torch.device) -> None:
    h, w2 = inputs("odd", 40, 24, torch.float32, device)
    bias2 = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).to(device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    result = down(h, w2.mT.contiguous().mT, rows, tile=TILES["plain"], bias2=bias2)
    assert_close(result, down_ref(h, w2, rows, tile=TILES["plain"], bias2=bias2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(189, 25)}, "h must be [189, 24]"),
        ({"h": torch.zeros(188, 24)}, "h must be [189, 24]"),
        ({"h": torch.zeros(189, 24).half()}, "h must be [189, 24] torch.float32"),
        ({"h": torch.zeros(24, 189).mT}, "h must be contiguous"),
        ({"w2": torch.zeros(6, 40, 24)}, "offsets must be [7], got [8]"),
        ({"bias2": torch.zeros(7, 24)}, "bias2 must be [7, 40], got [7, 24]"),
    ],
)
def test_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    h, w2 = inputs("odd", 40, 24, torch.float32, torch.device("cpu"))
    rows = permuted(topk_ids("odd"), 7, 16)
    arguments = {"h": h, "w2": w2, "permutation": rows, "tile": TILES["plain"]}
    with pytest.raises(ValueError, match=re.escape(message)):
        down(**(arguments | change))

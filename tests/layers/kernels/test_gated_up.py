import re

import pytest
import torch
from tolerances import assert_close

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import gated_up, gated_up_ref
from moezoo.layers.kernels.permute import permute_ref


def inputs(
    routing: str, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, _, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator)
    w13 = torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    return x.to(device, dtype), w13.to(device, dtype)


@pytest.mark.parametrize(("hidden", "intermediate"), [(40, 24), (256, 64)], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_matches_reference(
    routing: str, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, w13 = inputs(routing, hidden, intermediate, dtype, device)
    _, k, num_experts = ROUTINGS[routing]
    tiles = permute_ref(topk_ids(routing).to(device), num_experts, 16)
    valid = int(tiles[1][-1])
    result = gated_up(x, w13, *tiles, k=k, tile_rows=16)
    expected = gated_up_ref(x, w13, *tiles, k=k, tile_rows=16)
    assert_close(result[:valid], expected[:valid])


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
def test_larger_tiles(tile_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.float32 and tile_rows > 32:
        pytest.skip("fp32 tiles have at most 32 rows")
    x, w13 = inputs("all-on-one", 72, 40, dtype, device)
    tiles = permute_ref(topk_ids("all-on-one").to(device), 3, tile_rows)
    result = gated_up(x, w13, *tiles, k=1, tile_rows=tile_rows)
    assert_close(result, gated_up_ref(x, w13, *tiles, k=1, tile_rows=tile_rows))


# One name for each function.
KERNELS = {function: name for name, function in ACTIVATIONS.items()}.values()


@pytest.mark.parametrize(
    "activation",
    [*KERNELS, Gating("silu", limit=2.5), Gating("quick_gelu", limit=0.5, up_offset=1.0)],
    ids=str,
)
def test_activations_and_bias(activation: str | Gating, device: torch.device) -> None:
    x, w13 = inputs("odd", 40, 24, torch.float32, device)
    bias13 = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(device)
    tiles = permute_ref(topk_ids("odd").to(device), 7, 16)
    settings = {"k": 3, "tile_rows": 16, "activation": activation, "bias13": bias13}
    assert_close(
        gated_up(3 * x, w13, *tiles, **settings), gated_up_ref(3 * x, w13, *tiles, **settings)
    )


def test_strided_arguments(device: torch.device) -> None:
    x, w13 = inputs("odd", 40, 24, torch.float32, device)
    tiles = permute_ref(topk_ids("odd").to(device), 7, 16)
    result = gated_up(
        x.repeat_interleave(2, 1)[:, ::2], w13.mT.contiguous().mT, *tiles, k=3, tile_rows=16
    )
    assert_close(result, gated_up_ref(x, w13, *tiles, k=3, tile_rows=16))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("intermediate", [24, 64])
def test_alternating_rows(intermediate: int, transposed: bool, device: torch.device) -> None:
    x, w13 = inputs("odd", 40, intermediate, torch.float32, device)
    bias13 = torch.randn(7, 2 * intermediate, generator=torch.Generator().manual_seed(1)).to(device)
    tiles = permute_ref(topk_ids("odd").to(device), 7, 16)
    expected = gated_up_ref(x, w13, *tiles, k=3, tile_rows=16, bias13=bias13)
    stored = w13.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if transposed:
        stored = stored.mT.contiguous().mT
    settings = {
        "k": 3,
        "tile_rows": 16,
        "bias13": bias13.unflatten(1, (2, -1)).mT.contiguous().mT,
    }
    halves = stored.unflatten(1, (-1, 2)).transpose(1, 2)
    assert halves.data_ptr() == stored.data_ptr()
    assert_close(gated_up(x, halves, *tiles, **settings), expected)
    assert_close(gated_up_ref(x, halves, *tiles, **settings), expected)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("routing", ["one-token", "odd", "absent"])
def test_without_a_gate(
    routing: str, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, w13 = inputs(routing, 40, 24, dtype, device)
    _, k, num_experts = ROUTINGS[routing]
    w1 = w13[:, :24].unsqueeze(1)
    bias = torch.randn(num_experts, 1, 24, generator=torch.Generator().manual_seed(1))
    tiles = permute_ref(topk_ids(routing).to(device), num_experts, 16)
    valid = int(tiles[1][-1])
    settings = {"activation": activation, "bias13": bias.to(device, dtype)}
    result = gated_up(x, w1, *tiles, k=k, tile_rows=16, **settings)
    expected = gated_up_ref(x, w1, *tiles, k=k, tile_rows=16, **settings)
    assert_close(result[:valid], expected[:valid])


def test_nan_passes_through(device: torch.device) -> None:
    x, w13 = inputs("odd", 40, 24, torch.float32, device)
    x[0] = torch.nan
    tiles = permute_ref(topk_ids("odd").to(device), 7, 16)
    for activation in (*KERNELS, Gating("silu", limit=1.0)):
        h = gated_up(x, w13, *tiles, k=3, tile_rows=16, activation=activation)
        assert torch.equal(h.isnan().all(-1), tiles[0] // 3 == 0)
        assert torch.equal(h.isnan().any(-1), tiles[0] // 3 == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of"),
        ({"w13": torch.zeros(7, 48, 41)}, "x must be [T, H] and w13 [E, 2I, H]"),
        ({"w13": torch.zeros(7, 47, 40)}, "x must be [T, H] and w13 [E, 2I, H]"),
        ({"w13": torch.zeros(7, 3, 24, 40)}, "x must be [T, H] and w13 [E, 2I, H]"),
        ({"w13": torch.zeros(7, 48, 40).half()}, "of one dtype"),
        ({"k": 2}, "order must be [126]"),
        ({"bias13": torch.zeros(7, 24)}, "bias13 must be [7, 48], got [7, 24]"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    x, w13 = inputs("odd", 40, 24, torch.float32, torch.device("cpu"))
    order, offsets, tile_experts = permute_ref(topk_ids("odd"), 7, 16)
    arguments = {
        "x": x,
        "w13": w13,
        "order": order,
        "offsets": offsets,
        "tile_experts": tile_experts,
        "k": 3,
        "tile_rows": 16,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_up(**(arguments | change))

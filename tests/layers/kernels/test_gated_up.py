import re

import pytest
import torch
from tolerances import assert_close

from kernels.routings import ROUTINGS, topk_ids
from kernels.tile_cases import TILES, permuted, tile_for
from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.kernels.gated_up import gated_up, gated_up_ref


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
    x, w13 = inputs(routing, hidden, intermediate, dtype, device)
    _, k, num_experts = ROUTINGS[routing]
    rows = permuted(topk_ids(routing).to(device), num_experts, tile.m)
    valid = int(rows.offsets[-1])
    result = gated_up(x, w13, rows, k=k, tile=tile)
    assert_close(result[:valid], gated_up_ref(x, w13, rows, k=k)[:valid])


PLAIN = TILES["plain"]

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
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    settings = {"k": 3, "tile": PLAIN, "activation": activation, "bias13": bias13}
    assert_close(gated_up(3 * x, w13, rows, **settings), gated_up_ref(3 * x, w13, rows, **settings))


def test_strided_arguments(device: torch.device) -> None:
    x, w13 = inputs("odd", 40, 24, torch.float32, device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    result = gated_up(
        x.repeat_interleave(2, 1)[:, ::2], w13.mT.contiguous().mT, rows, k=3, tile=PLAIN
    )
    assert_close(result, gated_up_ref(x, w13, rows, k=3, tile=PLAIN))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("intermediate", [24, 64])
def test_alternating_rows(intermediate: int, transposed: bool, device: torch.device) -> None:
    x, w13 = inputs("odd", 40, intermediate, torch.float32, device)
    bias13 = torch.randn(7, 2 * intermediate, generator=torch.Generator().manual_seed(1)).to(device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    expected = gated_up_ref(x, w13, rows, k=3, tile=PLAIN, bias13=bias13)
    stored = w13.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if transposed:
        stored = stored.mT.contiguous().mT
    settings = {
        "k": 3,
        "tile": PLAIN,
        "bias13": bias13.unflatten(1, (2, -1)).mT.contiguous().mT,
    }
    halves = stored.unflatten(1, (-1, 2)).transpose(1, 2)
    assert halves.data_ptr() == stored.data_ptr()
    assert_close(gated_up(x, halves, rows, **settings), expected)
    assert_close(gated_up_ref(x, halves, rows, **settings), expected)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("routing", ["one-token", "odd", "absent"])
def test_without_a_gate(
    routing: str, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, w13 = inputs(routing, 40, 24, dtype, device)
    _, k, num_experts = ROUTINGS[routing]
    w1 = w13[:, :24].unsqueeze(1)
    bias = torch.randn(num_experts, 1, 24, generator=torch.Generator().manual_seed(1))
    rows = permuted(topk_ids(routing).to(device), num_experts, 16)
    valid = int(rows.offsets[-1])
    settings = {"activation": activation, "bias13": bias.to(device, dtype)}
    result = gated_up(x, w1, rows, k=k, tile=PLAIN, **settings)
    expected = gated_up_ref(x, w1, rows, k=k, tile=PLAIN, **settings)
    assert_close(result[:valid], expected[:valid])


def test_nan_passes_through(device: torch.device) -> None:
    x, w13 = inputs("odd", 40, 24, torch.float32, device)
    x[0] = torch.nan
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    for activation in (*KERNELS, Gating("silu", limit=1.0)):
        h = gated_up(x, w13, rows, k=3, tile=PLAIN, activation=activation)
        assert torch.equal(h.isnan().all(-1), rows.order // 3 == 0)
        assert torch.equal(h.isnan().any(-1), rows.order // 3 == 0)


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
    rows = permuted(topk_ids("odd"), 7, 16)
    arguments = {"x": x, "w13": w13, "permutation": rows, "k": 3, "tile": PLAIN}
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_up(**(arguments | change))

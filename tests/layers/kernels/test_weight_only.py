import re
from dataclasses import replace

import pytest
import torch
from tolerances import assert_close, relative_difference
from torch import Tensor

from kernels.routings import ROUTINGS as SHAPES
from kernels.routings import topk_ids
from kernels.tile_cases import bulk_copies, permuted
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.kernels.down_weight_only import down_weight_only, down_weight_only_ref
from moezoo.layers.kernels.gated_up_weight_only import (
    gated_up_weight_only,
    gated_up_weight_only_ref,
)
from moezoo.layers.kernels.interleave import interleave_ref
from moezoo.layers.kernels.packed_operand import ways
from moezoo.layers.kernels.permute import permute, permute_ref
from moezoo.layers.kernels.tiles import Tile
from moezoo.layers.kernels.weight_only_tiles import plan_weight_only
from moezoo.layers.quant import WeightOnly
from moezoo.layers.quant.int4 import Int4
from moezoo.layers.quant.int8 import Int8
from moezoo.layers.quant.mxfp4 import Mxfp4

# Every way through the kernels.
TILES = {
    "plain": Tile(16, 32, 64, 4, 2),
    "tail": Tile(64, 32, 64, 4, 2, tail=16),
    "descriptors-persistent": Tile(16, 32, 64, 4, 2, descriptors=True, programs_per_sm=1),
    "descriptors-tail": Tile(64, 32, 128, 4, 2, descriptors=True, tail=32),
    "many": Tile(128, 32, 64, 8, 2, descriptors=True),
}

FORMATS = {
    "int4-32": (Int4, {"group_size": 32}),
    "int4-64-zeros": (Int4, {"group_size": 64, "zeros": True}),
    "int4-channel": (Int4, {"group_size": -1}),
    "int8-channel": (Int8, {}),
    "int8-64": (Int8, {"group_size": 64}),
    "int8-64-zeros": (Int8, {"group_size": 64, "zeros": True}),
    "int8-channel-zeros": (Int8, {"zeros": True}),
    "mxfp4": (Mxfp4, {}),
}

LONG_GROUPS = {"int4-128": (Int4, {"group_size": 128})}
"""For sizes that 128 divides."""

ROUTINGS = {
    "plain": "every-expert",
    "tail": "odd",
    "descriptors-persistent": "absent",
    "descriptors-tail": "all-on-one",
    "many": "odd",
}


def weights(name: str, *shape: int, device: torch.device, seed: int = 0) -> WeightOnly:
    """Rows of very different sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
    w *= torch.rand(*shape[:-1], 1, generator=generator) * 1.75 + 0.25
    format_, options = (FORMATS | LONG_GROUPS)[name]
    return format_.quantize(w, **options).map(lambda tensor: tensor.to(device))


def with_signs(w: Int4 | Int8) -> Int4 | Int8:
    """With some scales below zero, as AutoRound writes them."""
    signs = 1 - 2 * (torch.arange(w.scales.numel(), device=w.device) % 3 % 2)
    return replace(w, scales=w.scales * signs.view(w.scales.shape))


def tokens(num_tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype)


def interleaved(x: Tensor, w13: WeightOnly) -> Tensor:
    return interleave_ref(x, ways(type(w13), w13.shape[-1])).contiguous()


def check(
    x: Tensor,
    w13: WeightOnly,
    w2: WeightOnly,
    ids: Tensor,
    tiles: tuple[Tile, Tile],
    *,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str | Gating = "silu",
) -> None:
    rows = permuted(ids, len(w13.data), tiles[0].m)
    x = interleaved(x, w13)
    up = {"k": ids.shape[1], "tile": tiles[0], "bias13": bias13, "activation": activation}
    h = gated_up_weight_only(x, w13, rows, **up)
    expected = gated_up_weight_only_ref(x, w13, rows, **up)
    end = int(rows.offsets[-1])
    assert_close(h[:end], expected[:end])
    # Rows of absent experts were never written.
    expected[end:] = torch.nan
    y = down_weight_only(expected, w2, rows, tile=tiles[1], bias2=bias2)
    assert_close(y[:end], down_weight_only_ref(expected, w2, rows, bias2=bias2)[:end])
    again = down_weight_only(expected, w2, rows, tile=tiles[1], bias2=bias2)
    assert torch.equal(y[:end], again[:end])


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.sampled(n=7)
def test_matches_reference(
    format_: str, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    if device.type == "cpu" and dtype == torch.float32 and name != "plain":
        pytest.skip("the interpreter's way is the one of fp16")
    tile = bulk_copies(TILES[name], device)
    if dtype == torch.float32 and tile.m > 32:
        pytest.skip("fp32 tiles have at most 32 rows")
    num_tokens, _, num_experts = SHAPES[ROUTINGS[name]]
    hidden, intermediate = (64, 128) if "-64" in format_ else (96, 64)
    w13 = weights(format_, num_experts, 2, intermediate, hidden, device=device)
    w2 = weights(format_, num_experts, hidden, intermediate, device=device, seed=2)
    x = tokens(num_tokens, hidden, device, dtype)
    check(x, w13, w2, topk_ids(ROUTINGS[name]).to(device), (tile, tile))


@pytest.mark.parametrize("name", ["plain", "many"])
@pytest.mark.parametrize("format_", ["int4-32", "int4-64-zeros", "int8-channel", "int8-64"])
def test_negative_scales(format_: str, name: str, device: torch.device) -> None:
    tile = bulk_copies(TILES[name], device)
    num_tokens, _, num_experts = SHAPES["odd"]
    w13 = with_signs(weights(format_, num_experts, 2, 64, 128, device=device))
    w2 = with_signs(weights(format_, num_experts, 128, 64, device=device, seed=2))
    x = tokens(num_tokens, 128, device, torch.float16)
    check(x, w13, w2, topk_ids("odd").to(device), (tile, tile))


@pytest.mark.parametrize("name", ["plain", "many"])
def test_a_group_longer_than_a_block(name: str, device: torch.device) -> None:
    tile = bulk_copies(TILES[name], device)
    w13 = weights("int4-128", 7, 2, 128, 256, device=device)
    w2 = weights("int4-128", 7, 256, 128, device=device, seed=2)
    assert tile.k < 128
    x = tokens(SHAPES["odd"][0], 256, device, torch.float16)
    check(x, w13, w2, topk_ids("odd").to(device), (tile, tile))


@pytest.mark.parametrize(
    ("format_", "hidden", "intermediate"),
    [
        *(("int4-channel", 130, 54), ("int4-channel", 52, 44)),
        *(("int8-channel", 131, 53), ("int8-channel-zeros", 131, 53)),
    ],
)
@pytest.mark.sampled(n=2)
def test_sizes_that_fill_no_words(
    format_: str, hidden: int, intermediate: int, device: torch.device, dtype: torch.dtype
) -> None:
    w13 = weights(format_, 5, 2, intermediate, hidden, device=device)
    w2 = weights(format_, 5, hidden, intermediate, device=device, seed=2)
    x = tokens(9, hidden, device, dtype)
    check(x, w13, w2, topk_ids("every-expert").to(device), (TILES["plain"], TILES["plain"]))


@pytest.mark.parametrize("format_", ["int4-32", "mxfp4"])
@pytest.mark.parametrize("gating", ["gelu", Gating("quick_gelu", limit=0.5, up_offset=1.0)])
@pytest.mark.sampled(n=4)
def test_gatings_biases_and_strides(
    format_: str, gating: str | Gating, device: torch.device, dtype: torch.dtype
) -> None:
    w13 = weights(format_, 7, 2, 32, 64, device=device)
    w2 = weights(format_, 7, 64, 32, device=device, seed=2)
    generator = torch.Generator().manual_seed(2)
    bias13 = torch.randn(7, 2, 32, generator=generator).to(device, dtype)
    bias2 = torch.randn(7, 64, generator=generator).to(device, dtype)
    # Rows of gate and up that alternate in memory.
    alternating = w13.map(lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2))
    x, tile = tokens(63, 64, device, dtype), TILES["plain"]
    more = {"bias13": bias13, "bias2": bias2, "activation": gating}
    check(x, alternating, w2, topk_ids("odd").to(device), (tile, tile), **more)


def test_without_a_gate(device: torch.device, dtype: torch.dtype) -> None:
    w13 = weights("int8-channel", 7, 1, 48, 64, device=device)
    w2 = weights("int8-channel", 7, 64, 48, device=device, seed=2)
    x, tile = tokens(63, 64, device, dtype), TILES["plain"]
    check(x, w13, w2, topk_ids("odd").to(device), (tile, tile), activation="relu2")


def test_nan_stays_in_its_row(device: torch.device, dtype: torch.dtype) -> None:
    x = tokens(63, 64, device, dtype)
    x[4, 7] = torch.nan
    w13 = weights("int4-32", 7, 2, 32, 64, device=device)
    rows = permuted(topk_ids("odd").to(device), 7, 16)
    h = gated_up_weight_only(interleaved(x, w13), w13, rows, k=3, tile=TILES["plain"])
    assert torch.equal(h.isnan().all(-1), rows.order // 3 == 4)
    assert torch.equal(h.isnan().any(-1), rows.order // 3 == 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(63, 32)}, "x must be [T, 64] as w13 is"),
        ({"k": 2}, "order must be [126]"),
        ({"bias13": torch.zeros(7, 64)}, "bias13 must be [7, 2, 32]"),
        ({"w13": weights("int4-32", 7, 64, 64, device=torch.device("cpu"))}, "w13 must be [E, 2"),
    ],
)
def test_gated_up_refuses(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(63, 64),
        "w13": weights("int4-32", 7, 2, 32, 64, device=torch.device("cpu")),
        "permutation": permute_ref(topk_ids("odd"), 7, 16),
        "k": 3,
        "tile": TILES["plain"],
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_up_weight_only(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(188, 64)}, "h must be [189, 64]"),
        ({"h": torch.zeros(189, 60)}, "h must be [189, 64]"),
        ({"bias2": torch.zeros(7, 60)}, "bias2 must be [7, 32]"),
    ],
)
def test_down_refuses(change: dict[str, object], message: str) -> None:
    arguments = {
        "h": torch.zeros(189, 64),
        "w2": weights("int4-32", 7, 32, 64, device=torch.device("cpu")),
        "permutation": permute_ref(topk_ids("odd"), 7, 16),
        "tile": TILES["plain"],
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        down_weight_only(**(arguments | change))


def test_refuses_columns_in_an_order_of_their_own() -> None:
    w2 = weights("int8-64", 7, 32, 64, device=torch.device("cpu"))
    ordered = replace(w2, order=torch.arange(64, dtype=torch.int32).expand(7, 64))
    rows = permuted(topk_ids("odd"), 7, 16)
    with pytest.raises(ValueError, match="w2 has its columns in an order of its own"):
        down_weight_only(torch.zeros(189, 64), ordered, rows, tile=TILES["plain"])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 300, 1000])
@pytest.mark.parametrize("format_", FORMATS)
def test_planned_tiles_at_real_sizes(format_: str, num_tokens: int) -> None:
    cuda = torch.device("cuda")
    w13 = weights(format_, 8, 2, 768, 2048, device=cuda)
    w2 = weights(format_, 8, 2048, 768, device=cuda, seed=2)
    x = tokens(num_tokens, 2048, cuda, torch.bfloat16)
    ids = torch.rand(num_tokens, 8, device=cuda).topk(3).indices.int()
    tiles = plan_weight_only(x, w13, w2, num_rows=ids.numel())
    check(x, w13, w2, ids, (tiles.gated_up, tiles.down))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize("format_", FORMATS)
def test_tiles_of_256_rows(format_: str, k: int) -> None:
    cuda = torch.device("cuda")
    w13 = weights(format_, 8, 2, 768, 2048, device=cuda)
    w2 = weights(format_, 8, 2048, 768, device=cuda, seed=2)
    ids = torch.rand(1000, 8, device=cuda).topk(3).indices.int()
    up = Tile(256, 64, k, 8, 2, descriptors=True, weights_first=True)
    x = tokens(1000, 2048, cuda, torch.bfloat16)
    check(x, w13, w2, ids, (up, replace(up, n=128)))


@pytest.mark.gpu
def test_in_a_graph() -> None:
    cuda = torch.device("cuda")
    w13 = weights("int4-32", 8, 2, 256, 512, device=cuda)
    x = interleaved(tokens(16, 512, cuda, torch.bfloat16), w13)
    ids = torch.rand(16, 8, device=cuda).topk(3).indices.int()
    tile = plan_weight_only(x, w13, w13[0], num_rows=48).gated_up

    def run() -> Tensor:
        return gated_up_weight_only(x, w13, permute(ids, 8, tile.m), k=3, tile=tile)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = run()
    graph.replay()
    assert relative_difference(h, expected) == 0

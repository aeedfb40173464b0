import re
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import (
    apply_rotary_pos_emb as apply_partial_rotary,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

from moezoo.layers.kernels.rotate_store import rotate_and_store, rotate_and_store_ref

EPS = 1e-5


def rotation(num_rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Any:
    """As `RotaryEmbedding` makes it: the first half of the sines is negative."""
    frequencies = 100.0 ** -torch.linspace(0, 1, dim // 2)
    angles = torch.arange(7, 7 + num_rows)[:, None] * torch.cat((-frequencies, frequencies))
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    norm: str = "none",
) -> dict[str, Any]:
    """`shape` is rows, query heads, key heads, head width. Row 1 is stored nowhere."""
    num_rows, num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    slots = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
    slots[1:2] = -1
    heads = {"none": (), "each_head": (1, 1), "all_heads": (num_heads, num_kv_heads)}[norm]
    weights = [1 + normal(n * head_dim) / 4 for n in heads]
    return {
        "qkv": normal(num_rows, (num_heads + 2 * num_kv_heads) * head_dim),
        "rotation": rotation(num_rows, head_dim, dtype, device),
        "slots": slots.to(device),
        "keys": normal(num_rows + 3, num_kv_heads, head_dim),
        "values": normal(num_rows + 3, num_kv_heads, head_dim),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "eps": EPS,
        **dict(zip(("q_weight", "k_weight"), weights, strict=False)),
    }


def results(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values that were there and are there now."""
    caches = {name: arguments[name].clone() for name in ("keys", "values")}
    return function(**(arguments | caches)), caches["keys"], caches["values"]


def check(arguments: dict[str, Any]) -> None:
    for actual, expected in zip(
        results(rotate_and_store, arguments), results(rotate_and_store_ref, arguments), strict=True
    ):
        assert_close(actual, expected)


@pytest.mark.parametrize("norm", ["none", "each_head", "all_heads"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2), (5, 6, 2, 20), (3, 16, 16, 128), (3, 32, 4, 128), (2, 3, 1, 80), (2, 5, 5, 12)],
    ids=str,
)
@pytest.mark.sampled(n=3)
def test_matches_reference(
    shape: tuple[int, int, int, int], norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    check(inputs(shape, dtype, device, norm))


@pytest.mark.parametrize("norm", ["none", "each_head", "all_heads"])
def test_clip(norm: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs((5, 6, 2, 20), dtype, device, norm)
    check(arguments | {"clip": 0.5})
    _, _, values = results(rotate_and_store, arguments | {"clip": 0.5})
    assert values[arguments["slots"][0]].abs().max() == 0.5


@pytest.mark.parametrize("norm", ["none", "each_head", "all_heads"])
@pytest.mark.parametrize("rotated", [0, 2, 6, 12, 18, 20])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.sampled(n=8)
def test_other_pairs(
    rotated: int, interleaved: bool, norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Part of each head is rotated, or nothing."""
    arguments = inputs((5, 6, 2, 20), dtype, device, norm)
    arguments["rotation"] = rotation(5, rotated, dtype, device) if rotated else None
    check(arguments | {"interleaved": interleaved})


@pytest.mark.parametrize("value_dim", [2, 12, 34])
@pytest.mark.parametrize("norm", ["none", "each_head", "all_heads"])
def test_values_of_another_width(
    norm: str, value_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = inputs((5, 6, 2, 20), dtype, device, norm)
    arguments["qkv"] = arguments["qkv"].repeat(1, 2)[:, : 160 + 2 * value_dim].contiguous()
    check(arguments | {"values": arguments["values"].repeat(1, 1, 2)[..., :value_dim].contiguous()})


def test_partial_rotation_matches_transformers(device: torch.device) -> None:
    arguments = inputs((5, 6, 2, 20), torch.float32, device)
    cos, sin = arguments["rotation"] = rotation(5, 12, torch.float32, device)
    unsigned = torch.cat((-sin[:, :6], sin[:, 6:]), -1)
    q, k, _ = (
        part.unflatten(-1, (-1, 20)).transpose(0, 1)[None]
        for part in arguments["qkv"].split((120, 40, 40), -1)
    )
    expected_q, expected_k = apply_partial_rotary(q, k, cos[None], unsigned[None])
    q, keys, _ = results(rotate_and_store, arguments)
    assert_close(q, expected_q[0].transpose(0, 1))
    for row in (0, 2, 3, 4):
        assert_close(keys[arguments["slots"][row]], expected_k[0, :, row])


@pytest.mark.parametrize("norm", ["each_head", "all_heads"])
def test_matches_transformers(norm: str, device: torch.device) -> None:
    arguments = inputs((5, 6, 2, 20), torch.float32, device, norm)
    parts = arguments["qkv"].split((120, 40, 40), -1)
    heads = []
    for part, name in zip(parts, ("q_weight", "k_weight"), strict=False):
        weight = arguments[name]
        rms_norm = OlmoeRMSNorm(len(weight), EPS).to(device)
        rms_norm.weight.data = weight
        normed = rms_norm(part.unflatten(-1, (-1, len(weight)))).detach().flatten(1)
        heads.append(normed.unflatten(-1, (-1, 20)).transpose(0, 1)[None])
    cos, sin = arguments["rotation"]
    unsigned = torch.cat((-sin[:, :10], sin[:, 10:]), -1)
    expected_q, expected_k = apply_rotary_pos_emb(*heads, cos[None], unsigned[None])
    q, keys, values = results(rotate_and_store, arguments)
    assert_close(q, expected_q[0].transpose(0, 1))
    for row in (0, 2, 3, 4):
        assert_close(keys[arguments["slots"][row]], expected_k[0, :, row])
        assert torch.equal(values[arguments["slots"][row]], parts[2][row].view(2, 20))


def test_other_slots_stay_as_they_are(device: torch.device) -> None:
    arguments = inputs((5, 6, 2, 20), torch.float32, device)
    _, keys, values = results(rotate_and_store, arguments)
    others = torch.ones(8, dtype=torch.bool)
    others[arguments["slots"].cpu()[[0, 2, 3, 4]]] = False
    assert others.sum() == 4
    assert torch.equal(keys[others.to(device)], arguments["keys"][others.to(device)])
    assert torch.equal(values[others.to(device)], arguments["values"][others.to(device)])


def test_strides_and_types(device: torch.device) -> None:
    arguments = inputs((5, 6, 2, 20), torch.bfloat16, device, "each_head")
    expected = results(rotate_and_store, arguments)
    wide = torch.full((5, 300), torch.nan, device=device, dtype=torch.bfloat16)
    wide[:, 7:207] = arguments["qkv"]
    # Keys and values of a token beside each other.
    cache = torch.stack((arguments["keys"], arguments["values"]), 2)
    changed = {
        "qkv": wide[:, 7:207],
        "rotation": tuple(part[None, :, None] for part in arguments["rotation"]),
        "slots": arguments["slots"].int(),
        "keys": cache[:, :, 0],
        "values": cache[:, :, 1],
        "q_weight": arguments["q_weight"].float(),
        "k_weight": arguments["k_weight"].float(),
    }
    q = rotate_and_store(**(arguments | changed))
    assert_close(q, expected[0])
    assert_close(cache[:, :, 0], expected[1])
    assert_close(cache[:, :, 1], expected[2])


@pytest.mark.gpu
def test_cache_of_more_numbers_than_int32_counts() -> None:
    device = torch.device("cuda")
    arguments = inputs((5, 6, 2, 20), torch.float16, device)
    _, keys, values = results(rotate_and_store, arguments)
    cache = torch.empty(2**20 + 8, 2, 1024, device=device, dtype=torch.float16)
    moved = {
        "slots": torch.where(arguments["slots"] < 0, -1, arguments["slots"] + 2**20).int(),
        "keys": cache[:, :, :20],
        "values": cache[:, :, 20:40],
    }
    rotate_and_store(**(arguments | moved))
    stored = arguments["slots"][arguments["slots"] >= 0]
    assert torch.equal(moved["keys"][2**20 :][stored], keys[stored])
    assert torch.equal(moved["values"][2**20 :][stored], values[stored])


@pytest.mark.parametrize("norm", ["each_head", "all_heads"])
def test_nan_stays_in_its_row(norm: str, device: torch.device) -> None:
    arguments = inputs((5, 6, 2, 20), torch.float32, device, norm) | {"clip": 2.0}
    arguments["qkv"][3] = torch.nan
    q, keys, values = results(rotate_and_store, arguments)
    slot = arguments["slots"][3]
    for tensor, row in ((q, 3), (keys, slot), (values, slot)):
        assert tensor[row].isnan().all()
        assert tensor.isnan().sum() == tensor[row].numel()


def test_no_rows(device: torch.device) -> None:
    assert rotate_and_store(**inputs((0, 6, 2, 20), torch.float32, device)).shape == (0, 6, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(5, 201)}, "qkv must be [N, 200] of dense rows, got [5, 201]"),
        ({"qkv": torch.zeros(200, 5).mT}, "qkv must be [N, 200] of dense rows"),
        ({"keys": torch.zeros(8, 1, 20)}, "keys must be [S, 2, ..] torch.float32"),
        ({"values": torch.zeros(8, 2, 10)}, "qkv must be [N, 180] of dense rows"),
        ({"values": torch.zeros(8, 1, 20)}, "values must be [S, 2, ..] torch.float32"),
        ({"keys": torch.zeros(8, 2, 20).half()}, "keys must be [S, 2, ..] torch.float32"),
        ({"keys": torch.zeros(8, 20, 2).mT}, "keys must have dense heads"),
        ({"slots": torch.zeros(4).long()}, "slots must be [5] int32 or int64"),
        ({"slots": torch.zeros(5)}, "slots must be [5] int32 or int64"),
        ({"rotation": (torch.zeros(5, 10), torch.zeros(5, 20))}, "a cosine and a sine [5, 10]"),
        ({"rotation": (torch.zeros(5, 9),) * 2}, "even width up to 20, got 9"),
        ({"rotation": (torch.zeros(5, 22),) * 2}, "even width up to 20, got 22"),
        ({"rotation": (torch.zeros(1, 20),) * 2}, "a cosine and a sine [5, 20]"),
        ({"q_weight": torch.zeros(20)}, "q_weight and k_weight must both be [20]"),
        ({"q_weight": torch.zeros(20), "k_weight": torch.zeros(40)}, "or [120] and [40], or None"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = inputs((5, 6, 2, 20), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        rotate_and_store(**(arguments | change))


def test_refuses_heads_of_odd_width() -> None:
    arguments = inputs((5, 6, 2, 20), torch.float32, torch.device("cpu"))
    cache = torch.zeros(8, 2, 21)
    change = {"qkv": torch.zeros(5, 210), "keys": cache, "values": cache}
    with pytest.raises(ValueError, match="even width, got 21"):
        rotate_and_store(**(arguments | change))

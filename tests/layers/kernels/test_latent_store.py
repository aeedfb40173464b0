import re
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from kernels.test_rotate_store import rotation
from moezoo.layers.kernels.latent_store import latent_store, latent_store_ref
from moezoo.layers.rope import NoRotation

EPS = 1e-6


def inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """`shape` is rows, heads, C, R, and what a head has before R. Row 1 is stored nowhere."""
    num_rows, num_heads, latent_dim, rope_dim, nope_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    slots = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
    slots[1:2] = -1
    return {
        "q": normal(num_rows, num_heads, nope_dim + rope_dim),
        "kv_a": normal(num_rows, latent_dim + rope_dim),
        "rotation": rotation(num_rows, rope_dim, dtype, device),
        "slots": slots.to(device),
        "cache": normal(num_rows + 3, 1, latent_dim + rope_dim),
        "norm_weight": 1 + normal(latent_dim) / 4,
        "eps": EPS,
        "interleaved": True,
        "out": normal(num_rows, num_heads, latent_dim + rope_dim),
    }


def results(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    written = {name: arguments[name].clone() for name in ("cache", "out")}
    assert function(**(arguments | written)) is None
    return written["cache"], written["out"]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2, 1), (5, 3, 40, 12, 20), (3, 16, 512, 64, 128), (2, 20, 100, 80, 30)],
    ids=str,
)
def test_matches_reference(
    shape: tuple[int, int, int, int, int],
    interleaved: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    arguments = inputs(shape, dtype, device) | {"interleaved": interleaved}
    cache, out = results(latent_store, arguments)
    expected_cache, expected_out = results(latent_store_ref, arguments)
    assert_close(cache, expected_cache)
    assert_close(out, expected_out)
    rope_dim = shape[3]
    assert torch.equal(out[..., :-rope_dim], arguments["out"][..., :-rope_dim])


@pytest.mark.parametrize("interleaved", [True, False])
def test_matches_transformers(interleaved: bool, device: torch.device) -> None:
    arguments = inputs((5, 3, 40, 12, 20), torch.float32, device) | {"interleaved": interleaved}
    norm = DeepseekV3RMSNorm(40, EPS).to(device)
    norm.weight.data = arguments["norm_weight"]
    latent = norm(arguments["kv_a"][:, :40]).detach()
    cos, sin = arguments["rotation"]
    unsigned = torch.cat((-sin[:, :6], sin[:, 6:]), -1)
    q = arguments["q"][..., 20:].transpose(0, 1)[None]
    k = arguments["kv_a"][None, None, :, 40:]
    rotate = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    expected_q, expected_k = rotate(q, k, cos[None], unsigned[None])
    cache, out = results(latent_store, arguments)
    assert_close(out[..., 40:], expected_q[0].transpose(0, 1))
    for row in (0, 2, 3, 4):
        stored = cache[arguments["slots"][row], 0]
        assert_close(stored, torch.cat((latent[row], expected_k[0, 0, row])))


def test_no_rotation_leaves_numbers_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs((5, 3, 40, 12, 20), dtype, device) | {"interleaved": False}
    arguments["rotation"] = NoRotation(12)(torch.arange(5, device=device)[None], dtype)
    cache, out = results(latent_store, arguments)
    slots = arguments["slots"]
    assert torch.equal(out[..., 40:], arguments["q"][..., 20:])
    assert torch.equal(cache[slots[slots >= 0], 0, 40:], arguments["kv_a"][slots >= 0, 40:])


def test_other_slots_stay_as_they_are(device: torch.device) -> None:
    arguments = inputs((5, 3, 40, 12, 20), torch.float32, device)
    cache, _ = results(latent_store, arguments)
    others = torch.ones(8, dtype=torch.bool)
    others[arguments["slots"].cpu()[[0, 2, 3, 4]]] = False
    assert others.sum() == 4
    assert torch.equal(cache[others.to(device)], arguments["cache"][others.to(device)])


@pytest.mark.gpu
def test_cache_of_more_numbers_than_int32_counts() -> None:
    device = torch.device("cuda")
    arguments = inputs((5, 3, 40, 12, 20), torch.float16, device)
    expected, _ = results(latent_store, arguments)
    cache = torch.empty(2**20 + 8, 1, 2048, device=device, dtype=torch.float16)[..., :52]
    slots = torch.where(arguments["slots"] < 0, -1, arguments["slots"] + 2**20).int()
    latent_store(**(arguments | {"slots": slots, "cache": cache}))
    stored = arguments["slots"][arguments["slots"] >= 0]
    assert_close(cache[2**20 :][stored], expected[stored])


@pytest.mark.parametrize("interleaved", [True, False])
def test_in_place(interleaved: bool, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs((5, 40, 40, 64, 20), dtype, device) | {"interleaved": interleaved}
    _, expected = results(latent_store, arguments)
    q = arguments["q"].clone()
    latent_store(**(arguments | {"q": q, "out": q}))
    assert_close(q[..., 20:], expected[..., 40:])
    assert torch.equal(q[..., :20], arguments["q"][..., :20])


def test_strides_and_types(device: torch.device) -> None:
    arguments = inputs((5, 3, 40, 12, 20), torch.bfloat16, device)
    expected_cache, expected_out = results(latent_store, arguments)

    def apart(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 9), torch.nan)
        wide[..., 5:-4] = x
        return wide[..., 5:-4]

    cache = apart(arguments["cache"])
    out = apart(arguments["out"].transpose(0, 1)).transpose(0, 1)
    changed = {
        "q": apart(arguments["q"].transpose(0, 1)).transpose(0, 1),
        "kv_a": apart(arguments["kv_a"]),
        "rotation": tuple(part[None, :, None] for part in arguments["rotation"]),
        "slots": arguments["slots"].int(),
        "norm_weight": arguments["norm_weight"].float(),
    }
    latent_store(**(arguments | changed | {"cache": cache, "out": out}))
    assert_close(cache, expected_cache)
    assert_close(out, expected_out)


def test_no_rows(device: torch.device) -> None:
    arguments = inputs((0, 3, 40, 12, 20), torch.float32, device)
    cache, _ = results(latent_store, arguments)
    assert torch.equal(cache, arguments["cache"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_a": torch.zeros(5, 40)}, "kv_a must be [N, 40 + R] of dense rows"),
        ({"kv_a": torch.zeros(52, 5).mT}, "kv_a must be [N, 40 + R] of dense rows"),
        ({"kv_a": torch.zeros(5, 51)}, "R must be even, got 11"),
        ({"cache": torch.zeros(8, 1, 50)}, "cache must be [S, 1, 52] torch.float32"),
        ({"cache": torch.zeros(8, 1, 52).half()}, "cache must be [S, 1, 52] torch.float32"),
        ({"q": torch.zeros(4, 3, 32)}, "q must be [5, heads, ..], got [4, 3, 32]"),
        ({"out": torch.zeros(5, 4, 52)}, "out must be [5, heads, ..], got [5, 4, 52]"),
        ({"q": torch.zeros(5, 3, 11)}, "q must have dense heads of at least 12"),
        ({"out": torch.zeros(5, 3, 52).half()}, "out must have dense heads of at least 12"),
        ({"slots": torch.zeros(4).long()}, "slots must be [5] int32 or int64"),
        ({"rotation": (torch.zeros(5, 10),) * 2}, "a cosine and a sine [5, 12]"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = inputs((5, 3, 40, 12, 20), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        latent_store(**(arguments | change))

import re

import pytest
import torch
from tolerances import RELATIVE, relative_difference
from torch import Tensor

from kernels.test_weight_only import FORMATS, weights, with_signs
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.kernels.few_tokens_weight_only import (
    few_tokens_weight_only,
    few_tokens_weight_only_ref,
    in_words,
)
from moezoo.layers.quant import Int4, Int8

DTYPES = [torch.float16, torch.bfloat16]


def inputs(
    name: str,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    num_parts: int = 2,
) -> dict[str, object]:
    num_tokens, num_experts, k, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return {
        "x": torch.randn(num_tokens, hidden, generator=generator).to(device, dtype),
        "w13": weights(name, num_experts, num_parts, intermediate, hidden, device=device, seed=1),
        "w2": weights(name, num_experts, hidden, intermediate, device=device, seed=2),
        "topk_weights": torch.rand(num_tokens, k, generator=generator).to(device),
        "topk_ids": scores.topk(k).indices.int().to(device),
    }


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert relative_difference(actual, expected) <= RELATIVE[expected.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 2, 64, 64), (2, 5, 3, 192, 128), (1, 3, 3, 2304, 1408)], ids=str
)
@pytest.mark.sampled(n=3)
def test_matches_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and (shape[3] > 64 or (dtype == torch.bfloat16) != (name == "mxfp4")):
        pytest.skip("minutes in the interpreter, or nothing new")
    arguments = inputs(name, shape, device, dtype)
    assert in_words(arguments["w13"]) and in_words(arguments["w2"])
    assert_close(few_tokens_weight_only(**arguments), few_tokens_weight_only_ref(**arguments))


@pytest.mark.parametrize("name", ["int4-32", "int4-64-zeros", "int8-channel", "int8-64"])
def test_negative_scales(name: str, device: torch.device) -> None:
    arguments = inputs(name, (2, 3, 2, 64, 64), device)
    arguments |= {matrix: with_signs(arguments[matrix]) for matrix in ("w13", "w2")}
    assert_close(few_tokens_weight_only(**arguments), few_tokens_weight_only_ref(**arguments))


@pytest.mark.parametrize("name", ["int4-channel", "int8-channel", "int8-channel-zeros"])
def test_rows_of_few_words(name: str, device: torch.device) -> None:
    arguments = inputs(name, (2, 4, 1, 24, 8), device)
    assert_close(few_tokens_weight_only(**arguments), few_tokens_weight_only_ref(**arguments))


@pytest.mark.parametrize("name", ["int4-64-zeros", "int8-64-zeros", "mxfp4"])
def test_absent_experts_and_nan(name: str, device: torch.device) -> None:
    arguments = inputs(name, (2, 6, 3, 64, 64), device)
    arguments["topk_ids"][0, 2] = -1
    arguments["topk_weights"][0, 2] = torch.nan
    arguments["topk_ids"][1, 1] = 6
    assert_close(few_tokens_weight_only(**arguments), few_tokens_weight_only_ref(**arguments))
    arguments["topk_ids"].fill_(-1)
    assert not few_tokens_weight_only(**arguments).any()


@pytest.mark.parametrize("name", ["int4-64-zeros", "int8-channel", "int8-64-zeros", "mxfp4"])
def test_biases_gates_and_strides(name: str, device: torch.device) -> None:
    arguments = inputs(name, (1, 4, 2, 64, 64), device)
    generator = torch.Generator().manual_seed(3)
    arguments["bias13"] = torch.randn(4, 2, 64, generator=generator).to(device)
    arguments["bias2"] = torch.randn(4, 64, generator=generator).to(device)
    arguments["activation"] = Gating("quick_gelu", limit=0.5, up_offset=1.0)
    expected = few_tokens_weight_only_ref(**arguments)
    for key in ("w13", "w2"):
        arguments[key] = arguments[key].map(lambda t: t.repeat_interleave(2, -2)[..., ::2, :])
    arguments["x"] = arguments["x"].repeat_interleave(2, 1)[:, ::2]
    assert_close(few_tokens_weight_only(**arguments), expected)


@pytest.mark.parametrize("name", ["int4-32", "int8-64"])
def test_without_a_gate(name: str, device: torch.device) -> None:
    arguments = inputs(name, (1, 3, 2, 64, 64), device, num_parts=1)
    arguments["activation"] = "relu2"
    assert_close(few_tokens_weight_only(**arguments), few_tokens_weight_only_ref(**arguments))


def test_each_token_alone(device: torch.device) -> None:
    arguments = inputs("int4-32", (2, 4, 2, 32, 32), device)
    together = few_tokens_weight_only(**arguments)
    for t in range(2):
        some = {name: arguments[name][t : t + 1] for name in ("x", "topk_weights", "topk_ids")}
        assert torch.equal(few_tokens_weight_only(**(arguments | some))[0], together[t])


def test_what_is_not_in_words() -> None:
    odd = Int4.quantize(torch.randn(2, 1, 8, 36), group_size=-1)
    assert not in_words(odd)
    assert in_words(Int8.quantize(torch.randn(2, 1, 8, 36)))
    shifted = torch.zeros(2 * 8 * 32 + 1, dtype=torch.int8)[1:].view(2, 1, 8, 32)
    assert not in_words(Int8(shifted, torch.ones(2, 1, 8, 1)))


def test_refuses(device: torch.device) -> None:
    arguments = inputs("int4-32", (1, 4, 2, 64, 96), device)
    for change, message in (
        ({"x": torch.zeros(1, 40)}, "x must be [T, 64]"),
        ({"topk_ids": torch.zeros(2, 3).int()}, "topk_weights and topk_ids must be [1, K]"),
        ({"w13": arguments["w2"]}, "w13 must be [E, 2 or 1, I, H]"),
        (inputs("int4-channel", (1, 4, 2, 64, 36), device), "rows of w2 are not of whole words"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            few_tokens_weight_only(**(arguments | change))

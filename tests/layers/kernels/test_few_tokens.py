import re
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from moezoo.layers.kernels.activations import Gating
from moezoo.layers.kernels.few_tokens import few_tokens, few_tokens_ref
from moezoo.layers.kernels.shared_expert import SharedExpert


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_tokens: int = 1,
) -> dict[str, Tensor]:
    num_experts, k, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "x": normal(num_tokens, hidden),
        "w13": normal(num_experts, 2 * intermediate, hidden) * hidden**-0.5,
        "w2": normal(num_experts, hidden, intermediate) * intermediate**-0.5,
    }
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :k].int()
    weights = torch.rand(num_tokens, k, generator=generator)
    return {
        **{name: tensor.to(device, dtype) for name, tensor in tensors.items()},
        "topk_weights": weights.to(device),
        "topk_ids": ids.to(device),
    }


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # no tl.dot: bf16 is right in the interpreter too


@pytest.mark.parametrize(
    "shape",
    [(4, 2, 40, 24), (1, 1, 1, 1), (8, 6, 20, 30), (16, 6, 1100, 72), (8, 8, 256, 300)],
    ids=str,
)
@pytest.mark.sampled(n=2)
def test_matches_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and shape[2] > 100:
        pytest.skip("half a minute in the interpreter")
    arguments = inputs(shape, dtype, device)
    assert_close(few_tokens(**arguments), few_tokens_ref(**arguments))


@pytest.mark.parametrize("num_tokens", [2, 3])
@pytest.mark.sampled(n=4)
def test_a_token_gets_what_it_gets_alone(
    num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = inputs((4, 2, 40, 24), dtype, device, num_tokens)
    arguments["topk_ids"][1] = -1
    out = few_tokens(**arguments)
    assert_close(out, few_tokens_ref(**arguments))
    for t in range(num_tokens):
        of_tokens = ("x", "topk_weights", "topk_ids")
        alone = {name: arguments[name][t : t + 1] for name in of_tokens}
        assert torch.equal(few_tokens(**(arguments | alone)), out[t : t + 1])


def shared_expert(
    hidden: int, width: int, num_tokens: int, *, device: torch.device, dtype: torch.dtype
) -> SharedExpert:
    """Of rows that lie apart, with NaN between them."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        wide = torch.full((size[0], size[1] + 8), torch.nan)
        wide[:, : size[1]] = torch.randn(*size, generator=generator) * size[1] ** -0.5
        return wide.to(device, dtype)[:, : size[1]]

    logits = torch.randn(num_tokens, generator=generator).to(device, dtype)
    return SharedExpert(normal(2 * width, hidden), normal(hidden, width), logits)


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize(
    ("shape", "width"),
    [((4, 2, 40, 24), 24), ((6, 3, 20, 30), 7), ((8, 6, 520, 72), 2300), ((2, 1, 16, 16), 1)],
    ids=str,
)
@pytest.mark.sampled(n=4)
def test_with_a_shared_expert(
    shape: tuple[int, int, int, int],
    width: int,
    num_tokens: int,
    with_logits: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type == "cpu" and shape[2] > 100:
        pytest.skip("half a minute in the interpreter")
    arguments = inputs(shape, dtype, device, num_tokens)
    arguments["topk_ids"][0, 0] = -1
    shared = shared_expert(shape[2], width, num_tokens, device=device, dtype=dtype)
    if not with_logits:
        shared = shared._replace(logits=None)
    assert_close(few_tokens(**arguments, shared=shared), few_tokens_ref(**arguments, shared=shared))


def test_no_tokens(device: torch.device) -> None:
    arguments = inputs((4, 2, 40, 24), torch.float32, device, num_tokens=0)
    assert few_tokens(**arguments).shape == (0, 40)


def test_absent_experts_and_nan(device: torch.device) -> None:
    arguments = inputs((6, 4, 40, 24), torch.float32, device)
    arguments["topk_ids"][0, 2] = -1
    arguments["topk_weights"][0, 2] = torch.nan
    assert_close(few_tokens(**arguments), few_tokens_ref(**arguments))
    arguments["topk_ids"][0, 3] = 6
    assert_close(few_tokens(**arguments), few_tokens_ref(**arguments))
    arguments["topk_ids"].fill_(-1)
    assert not few_tokens(**arguments).any()


def test_biases_gates_and_strides(device: torch.device) -> None:
    arguments = inputs((4, 2, 40, 24), torch.float32, device)
    biases = {
        "bias13": torch.randn(4, 48, generator=torch.Generator().manual_seed(1)).to(device),
        "bias2": torch.randn(4, 40, generator=torch.Generator().manual_seed(2)).to(device),
        "activation": Gating("quick_gelu", limit=0.5, up_offset=1.0),
    }
    expected = few_tokens_ref(**arguments, **biases)
    for name in ("w13", "w2"):
        arguments[name] = arguments[name].mT.contiguous().mT
    arguments["x"] = arguments["x"].repeat_interleave(2, 1)[:, ::2]
    arguments["topk_ids"] = arguments["topk_ids"].long()
    assert_close(few_tokens(**arguments, **biases), expected)


def test_without_a_gate(device: torch.device) -> None:
    arguments = inputs((4, 2, 40, 24), torch.float32, device)
    arguments["w13"] = arguments["w13"][:, :24].unsqueeze(1)
    options = {"activation": "relu2", "bias13": torch.full((4, 1, 24), 0.5, device=device)}
    assert_close(few_tokens(**arguments, **options), few_tokens_ref(**arguments, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 41)}, "x must be [T, 40]"),
        ({"w2": torch.zeros(4, 40, 23)}, "w2 [4, 40, 24] as w13 is"),
        ({"x": torch.zeros(2, 40)}, "topk_ids must be [2, K]"),
        ({"topk_ids": torch.zeros(1, 3).int()}, "topk_weights and topk_ids must be [1, K]"),
        (
            {"shared": SharedExpert(torch.zeros(14, 41), torch.zeros(40, 7))},
            "w13 must be [2I', 40] and w2 [40, I'] of dense rows, got [14, 41]",
        ),
        (
            {"shared": SharedExpert(torch.zeros(14, 40), torch.zeros(7, 40).mT)},
            "of dense rows, got [14, 40], (40, 1) and [40, 7], (1, 40)",
        ),
        (
            {"shared": SharedExpert(torch.zeros(14, 40), torch.zeros(40, 7), torch.zeros(2))},
            "logits must be [1], got [2]",
        ),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = inputs((4, 2, 40, 24), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        few_tokens(**(arguments | change))

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, relative_difference
from torch import Tensor

from moezoo.layers.kernels.add_norm import add_rms_norm
from moezoo.layers.kernels.router_logits import (
    add_norm_router_logits,
    add_norm_router_logits_ref,
    router_logits,
    router_logits_ref,
)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def inputs(
    num_tokens: int, num_experts: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator)
    gate = torch.randn(num_experts, hidden, generator=generator) * hidden**-0.5
    return x.to(device, dtype), gate.to(device, dtype)


def norm_inputs(
    num_tokens: int, num_experts: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of `add_norm_router_logits`."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter rounds to bfloat16 wrongly")
    x, gate = inputs(num_tokens, num_experts, hidden, dtype, device)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(num_tokens, hidden, generator=generator).to(device, dtype)
    norm_weight = (torch.rand(hidden, generator=generator) + 0.5).to(device, dtype)
    return {"x": x, "update": update, "gate": gate, "norm_weight": norm_weight, "eps": 1e-5}


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 64])
@pytest.mark.parametrize(
    ("num_experts", "hidden"),
    [(1, 1), (7, 100), (60, 129), (128, 2048), (257, 2049), (512, 8192)],
    ids=str,
)
@pytest.mark.sampled(n=7)
def test_matches_fp32(
    num_experts: int, hidden: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and num_experts * max(num_tokens, 17) > 1020:
        pytest.skip("slow in the interpreter")
    x, gate = inputs(num_tokens, num_experts, hidden, dtype, device)
    logits = router_logits(x, gate)
    assert logits.shape == (num_tokens, num_experts)
    expected = F.linear(x.double(), gate.double())
    assert logits.dtype == torch.float32
    assert relative_difference(logits, expected) <= 1e-5
    assert_close(router_logits_ref(x, gate), expected.float())
    assert torch.equal(router_logits(x, gate), logits)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 64])
@pytest.mark.parametrize(
    ("num_experts", "hidden"), [(0, 40), (1, 1), (7, 100), (60, 129), (128, 2048), (256, 7168)]
)
@pytest.mark.sampled(n=3)
def test_of_a_norm(
    num_experts: int, hidden: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and num_experts * max(num_tokens, 17) > 1020:
        pytest.skip("slow in the interpreter")
    arguments = norm_inputs(num_tokens, num_experts, hidden, dtype, device)
    x, update, gate, norm_weight = (arguments[name] for name in list(arguments)[:4])
    logits, normed, total = add_norm_router_logits(**arguments)
    _, expected_normed, expected_total = add_norm_router_logits_ref(**arguments)
    assert torch.equal(total, expected_total)
    assert torch.equal(total, x + update)
    assert_close(normed, expected_normed)
    if num_tokens:
        assert_close(normed, add_rms_norm(x, update, norm_weight, arguments["eps"])[0])
    assert logits.dtype == torch.float32
    assert logits.shape == (num_tokens, num_experts)
    assert relative_difference(logits, F.linear(normed.double(), gate.double())) <= 1e-5


def test_of_a_norm_without_an_update(dtype: torch.dtype, device: torch.device) -> None:
    arguments = norm_inputs(5, 7, 100, dtype, device) | {"update": None}
    logits, normed, total = add_norm_router_logits(**arguments)
    assert total is arguments["x"]
    assert_close(normed, add_norm_router_logits_ref(**arguments)[1])
    assert torch.equal(logits, router_logits(normed, arguments["gate"]))


def test_strides_and_unused_memory(dtype: torch.dtype, device: torch.device) -> None:
    arguments = norm_inputs(2, 10, 100, dtype, device)
    expected = add_norm_router_logits(**arguments)
    for name in ("x", "update", "gate"):
        tensor = arguments[name]
        wide = torch.full((len(tensor), 128), torch.nan).to(dtype)
        wide[:, :100] = tensor.cpu()
        arguments[name] = wide.to(device)[:, :100]
    for actual, same in zip(add_norm_router_logits(**arguments), expected, strict=True):
        assert torch.equal(actual, same)
    logits = router_logits(arguments["x"], arguments["gate"])
    assert torch.equal(logits, router_logits(arguments["x"].contiguous(), arguments["gate"]))


def test_a_token_with_nan_leaves_the_others_alone(device: torch.device) -> None:
    x, gate = inputs(5, 10, 100, torch.float16, device)
    expected = router_logits(x, gate)
    x[1, 3] = torch.nan
    logits = router_logits(x, gate)
    assert logits[1].isnan().all()
    assert torch.equal(logits[0], expected[0])
    assert torch.equal(logits[2:], expected[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(8, 41)}, "gate [E, H], got [2, 40] and [8, 41]"),
        ({"gate": torch.zeros(8, 40).half()}, "gate must be torch.float32 as x is"),
        ({"x": torch.zeros(65, 40)}, "x must be [T, H] with T <= 64"),
        ({"x": torch.zeros(1, 2, 40)}, "x must be [T, H]"),
        ({"x": torch.zeros(40, 2).mT}, "x's last stride must be 1"),
        ({"gate": torch.zeros(40, 8).mT}, "gate's last stride must be 1"),
        ({"update": torch.zeros(1, 40)}, "update must be [2, 40] torch.float32"),
        ({"update": torch.zeros(2, 40).half()}, "update must be [2, 40] torch.float32"),
        ({"update": torch.zeros(40, 2).mT}, "update's last stride must be 1"),
        ({"norm_weight": torch.zeros(41)}, "norm_weight must be [40]"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    arguments = norm_inputs(2, 8, 40, torch.float32, torch.device("cpu")) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        add_norm_router_logits(**arguments)
    if change.keys() <= {"x", "gate"}:
        with pytest.raises(ValueError, match=re.escape(message)):
            router_logits(arguments["x"], arguments["gate"])

"""The four launches together, as fused_experts makes them on CUDA."""

import pytest
import torch
from tolerances import assert_close, relative_difference

from kernels.fp8_cases import weights as fp8_weights
from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.dequantized import dequantized_experts
from moezoo.layers.moe.experts_dense import dense_cuda, dense_torch
from moezoo.layers.moe.experts_fp8 import fp8_cuda


@pytest.mark.parametrize("routing", ["one-token", "odd", "no-tokens", "all-on-one", "absent"])
def test_equals_the_torch_path(routing: str, dtype: torch.dtype, device: torch.device) -> None:
    num_tokens, k, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 40, generator=generator)
    w13 = torch.randn(num_experts, 48, 40, generator=generator) / 6
    w2 = torch.randn(num_experts, 40, 24, generator=generator) / 5
    weights = torch.rand(num_tokens, k, generator=generator)
    expert_map = torch.arange(num_experts).roll(1).int()
    x, w13, w2 = (tensor.to(device, dtype) for tensor in (x, w13, w2))
    rest = (weights.to(device), topk_ids(routing).to(device), "silu", None, None)
    for mapped in (None, expert_map.to(device)):
        result = dense_cuda(x, w13, w2, *rest, mapped)
        exact = dense_torch(x.float(), w13.float(), w2.float(), *rest, mapped)
        assert_close(result, exact.to(dtype))


@pytest.mark.parametrize("routing", ["one-token", "odd", "all-on-one", "absent"])
@pytest.mark.usefixtures("fp8")
def test_block_fp8_equals_the_torch_path(routing: str, device: torch.device) -> None:
    num_tokens, k, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 144, generator=generator).to(device, torch.float16)
    w13 = fp8_weights(num_experts, 2, 144, 144, device=device)
    w2 = fp8_weights(num_experts, 144, 144, device=device)
    weights = torch.rand(num_tokens, k, generator=generator).to(device)
    arguments = (x, w13, w2, weights, topk_ids(routing).to(device))
    settings = {"gating": Gating(), "bias13": None, "bias2": None}
    result = fp8_cuda(*arguments, **settings, num_experts=num_experts)
    # Some values of h round to their neighbour in fp8, see test_block_fp8.
    expected = dequantized_experts(*arguments, **settings)
    assert relative_difference(result, expected) <= 3e-2
    assert (result - expected).float().norm() <= 1e-2 * expected.float().norm()

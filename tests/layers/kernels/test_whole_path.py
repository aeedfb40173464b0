"""The four launches together, as fused_experts makes them on CUDA."""

import pytest
import torch
from tolerances import assert_close

from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.moe import experts


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
        result = experts._fused_experts_cuda(x, w13, w2, *rest, mapped)
        exact = experts._fused_experts_torch(x.float(), w13.float(), w2.float(), *rest, mapped)
        assert_close(result, exact.to(dtype))

"""The four launches together, as fused_experts makes them on CUDA."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tolerances import assert_close, relative_difference

from kernels.fp8_cases import FORMATS
from kernels.fp8_cases import weights as fp8_weights
from kernels.routings import ROUTINGS, topk_ids
from moezoo.layers.kernels.activations import Gating
from moezoo.layers.moe.dequantized import dequantized_experts
from moezoo.layers.moe.experts_dense import dense_cuda, dense_torch
from moezoo.layers.moe.experts_fp8 import fp8_cuda
from moezoo.layers.moe.experts_weight_only import weight_only_cuda
from moezoo.layers.quant import Format, Int4, Int8, Mxfp4
from moezoo.layers.quant.channel_fp8 import Fp8Weights


@pytest.mark.parametrize("routing", ["one-token", "odd", "no-tokens", "all-on-one", "absent"])
@pytest.mark.sampled(n=2)
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
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.usefixtures("fp8")
@pytest.mark.sampled(n=2)
def test_fp8_equals_the_torch_path(
    format_: type[Fp8Weights], routing: str, device: torch.device
) -> None:
    num_tokens, k, num_experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 144, generator=generator).to(device, torch.float16)
    w13 = fp8_weights(num_experts, 2, 144, 144, device=device, format_=format_)
    w2 = fp8_weights(num_experts, 144, 144, device=device, format_=format_)
    weights = torch.rand(num_tokens, k, generator=generator).to(device)
    arguments = (x, w13, w2, weights, topk_ids(routing).to(device))
    settings = {"gating": Gating(), "bias13": None, "bias2": None}
    result = fp8_cuda(*arguments, **settings, num_experts=num_experts)
    # Some values of h round to their neighbour in fp8, see test_block_fp8.
    expected = dequantized_experts(*arguments, **settings)
    assert relative_difference(result, expected) <= 3e-2
    assert (result - expected).float().norm() <= 1e-2 * expected.float().norm()


def ordered(w: torch.Tensor) -> Int4:
    """Groups of columns that are neighbours in another order."""
    order = torch.rand(*w.shape[:-2], w.shape[-1]).argsort(-1)
    columns = w.gather(-1, order.unsqueeze(-2).expand(w.shape))
    q = Int4.quantize(columns, group_size=32)
    return Int4(q.data, q.scales, order=order.int())


@pytest.mark.parametrize("routing", ["one-token", "absent"])
@pytest.mark.parametrize(
    "quantize",
    [
        Int8.quantize,
        partial(Int8.quantize, zeros=True),
        partial(Int4.quantize, zeros=True),
        Mxfp4.quantize,
        ordered,
    ],
    ids=["int8", "int8-zeros", "int4", "mxfp4", "int4-ordered"],
)
@pytest.mark.sampled(n=5)
def test_weight_only_equals_the_torch_path(
    quantize: Callable[[torch.Tensor], Format],
    routing: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    num_tokens, k, num_experts = ROUTINGS[routing]
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 64).to(device, dtype)
    w13 = (torch.randn(num_experts, 2, 96, 64) / 8).to(dtype)
    w2 = (torch.randn(num_experts, 64, 96) / 10).to(dtype)
    weights = torch.rand(num_tokens, k).to(device)
    arguments = (
        *(x, quantize(w13).map(lambda t: t.to(device)), quantize(w2).map(lambda t: t.to(device))),
        *(weights, topk_ids(routing).to(device)),
    )
    bias13, bias2 = torch.randn(num_experts, 2, 96), torch.randn(num_experts, 64)
    settings = {
        "gating": Gating(),
        "bias13": bias13.to(device, dtype),
        "bias2": bias2.to(device, dtype),
    }
    result = weight_only_cuda(*arguments, **settings, num_experts=num_experts)
    assert_close(result, dequantized_experts(*arguments, **settings))

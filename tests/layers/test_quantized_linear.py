"""Linear layers in every format against dense products of their dequantised weights."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import RELATIVE, relative_difference
from torch import Tensor

from moezoo.device import multiplies_fp8
from moezoo.errors import QuantizationError
from moezoo.layers import quantized_linear as module
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.norm import RMSNorm
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4
from moezoo.layers.quant.fp8 import FOR_EXPERTS, FOR_LINEARS, quantize_rows, require_fp8
from moezoo.layers.quantized_linear import OPERATORS, quantized_linear

KINDS: dict[str, tuple[type[Format], dict[str, Any]]] = {
    "block-fp8": (BlockFp8, {}),
    "channel-fp8": (ChannelFp8, {}),
    "int8": (Int8, {}),
    "int8-groups": (Int8, {"group_size": 32}),
    "int8-zeros": (Int8, {"group_size": 64, "zeros": True}),
    "int8-rows": (Int8, {"zeros": True}),
    "int4": (Int4, {}),
    "int4-zeros": (Int4, {"zeros": True}),
    "int4-rows": (Int4, {"group_size": -1, "zeros": True}),
    "int4-order": (Int4, {"group_size": 32}),
    "mxfp4": (Mxfp4, {}),
}
FP8_TOLERANCE = 3e-2
"""On a GPU, see test_block_fp8.TOLERANCE."""

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def quantized(kind: str, w: Tensor) -> Format:
    cls, options = KINDS[kind]
    if kind != "int4-order":
        return cls.quantize(w, **options)
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1)).to(w.device)
    return replace(cls.quantize(w[:, order], **options), order=order.int())


def expected(x: Tensor, weight: Format, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    if isinstance(weight, BlockFp8 | ChannelFp8):
        rows = quantize_rows(rows).dequantize()[:, : x.shape[-1]]
    bias = None if bias is None else bias.float()
    y = torch.nn.functional.linear(rows, weight.dequantize(), bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight.data))


def check(actual: Tensor, other: Tensor, kind: str) -> None:
    assert actual.shape == other.shape and actual.dtype == other.dtype
    on_gpu = actual.is_cuda and "fp8" in kind
    tolerance = FP8_TOLERANCE if on_gpu else RELATIVE[actual.dtype]
    assert relative_difference(actual, other) <= tolerance


@kinds
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 192), (3, 5, 192), (70, 192), (0, 192)], ids=str)
def test_equals_the_dense_product(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    x = (normal(*shape) * 192**0.5).to(device, dtype)
    weight = quantized(kind, normal(321, 192, seed=1).to(device, dtype))
    bias = normal(321, seed=2).to(device, dtype)
    for b in (None, bias):
        with torch.no_grad():
            check(quantized_linear(x, weight, b), expected(x, weight, b), kind)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(5120, 2048), (2048, 4096), (576, 7168), (1, 2048)])
def test_sizes_of_models(kind: str, num_tokens: int, n: int, k: int) -> None:
    x = (normal(num_tokens, k) * k**0.5).to("cuda", torch.bfloat16)
    weight = quantized(kind, normal(n, k, seed=1).to("cuda", torch.bfloat16))
    with torch.no_grad():
        check(quantized_linear(x, weight), expected(x, weight, None), kind)


@kinds
def test_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(5, 192), quantized(kind, normal(321, 192, seed=1))
    whole = quantized_linear(x, weight)
    sizes = []
    dequantize = type(weight).dequantize

    def watched(piece: Format) -> Tensor:
        sizes.append(piece.shape[0])
        return dequantize(piece)

    monkeypatch.setattr(module, "PIECE", 128 * 192)
    monkeypatch.setattr(type(weight), "dequantize", watched)
    assert relative_difference(quantized_linear(x, weight), whole) <= RELATIVE[torch.float32]
    assert sizes == [128, 128, 65]


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_cuda_graph(kind: str, num_tokens: int) -> None:
    x = normal(num_tokens, 192).to("cuda", torch.bfloat16)
    weight = quantized(kind, normal(321, 192, seed=1).cuda())
    with torch.no_grad():
        whole = quantized_linear(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = quantized_linear(x, weight)
    graph.replay()
    assert torch.equal(out, whole)


@kinds
def test_operator(kind: str, device: torch.device) -> None:
    weight = quantized(kind, normal(33, 192, seed=1).to(device))
    torch.library.opcheck(
        OPERATORS[type(weight)],
        (normal(5, 192).to(device), list(weight.tensors().values()), None),
        # test_schema compares its inputs by arithmetic that torch has not for fp8.
        test_utils=("test_faketensor", "test_autograd_registration"),
    )


@kinds
def test_layer(kind: str, device: torch.device) -> None:
    layer = FusedLinear(192, (64, 32), bias=True).to(device).requires_grad_(False)
    x = normal(2, 3, 192).to(device)
    weight = quantized(kind, layer.weight.detach())
    layer.quantize_(weight)
    check(torch.cat(layer.parts(x), -1), expected(x, weight, layer.bias), kind)
    assert set(layer.state_dict()) == {
        "bias",
        *(f"weight.{name}" for name, tensor in weight.tensors().items() if tensor is not None),
    }
    torch.compiler.reset()  # or the formats of other tests count as many recompilations
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(layer.bfloat16().weight().dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="build the layer anew"):
        layer.reset_parameters()


@kinds
@pytest.mark.parametrize("num_tokens", [1, 5])
@torch.inference_mode()
def test_a_norm_that_is_due_and_a_gated_mlp(
    kind: str, num_tokens: int, device: torch.device
) -> None:
    norm = RMSNorm(192, 1e-6).to(device)
    mlp = GatedMLP(192, 64, activation="silu").to(device)
    x, update, addend = (normal(1, num_tokens, 192, seed=s).to(device) for s in range(3))
    weights = [quantized(kind, layer.weight) for layer in (mlp.gate_up, mlp.down)]
    mlp.gate_up.quantize_(weights[0])
    total = norm(x + update)
    check(mlp.gate_up(norm.of_sum(x, update)), expected(total, weights[0], None), kind)
    # One of the two layers quantised, then both.
    gates, ups = expected(total, weights[0], None).chunk(2, -1)
    h = torch.nn.functional.silu(gates) * ups
    y = torch.nn.functional.linear(h, mlp.down.weight)
    tolerance = FP8_TOLERANCE if "fp8" in kind else 1e-4
    y += addend
    assert relative_difference(mlp(norm.of_sum(x, update), addend.clone()), y) <= tolerance
    mlp.down.quantize_(weights[1])
    y = expected(h, weights[1], None) + addend
    assert relative_difference(mlp(norm.of_sum(x, update), addend), y) <= tolerance


def test_refuses() -> None:
    layer = Linear(192, 33)
    with pytest.raises(ValueError, match=re.escape("weight must be [33, 192], got [192, 33]")):
        layer.quantize_(ChannelFp8.quantize(layer.weight.detach().T))
    layer.quantize_(Int8.quantize(layer.weight.detach()))
    x = normal(5, 192)
    with pytest.raises(ValueError, match="no gradient through Int8 weights"):
        layer(x)
    layer.requires_grad_(False)
    layer(x)
    with pytest.raises(ValueError, match="no gradient through Int8 weights"):
        layer(x.requires_grad_())


@kinds
@pytest.mark.parametrize("width", [90, 256])
def test_refuses_activations_of_another_width(kind: str, width: int, device: torch.device) -> None:
    if kind == "block-fp8" and device.type == "cuda" and not multiplies_fp8(device):
        pytest.skip("needs a GPU that multiplies fp8")
    weight = quantized(kind, normal(8, 128).to(device))
    with pytest.raises(
        ValueError, match=re.escape("x must be [.., 128] for weights [8, 128], got")
    ):
        quantized_linear(normal(2, width).to(device), weight)


@pytest.mark.gpu
def test_refuses_fp8_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr("moezoo.layers.quant.fp8.multiplies_fp8", lambda device: False)
    weight = quantized("channel-fp8", normal(32, 64).cuda())
    with pytest.raises(QuantizationError, match=r"8\.9 or later.*'dense': 'dequantize'"):
        quantized_linear(torch.ones(2, 64, device="cuda"), weight)


@pytest.mark.parametrize("instead", [FOR_EXPERTS, FOR_LINEARS])
def test_what_an_old_gpu_is_told(monkeypatch, instead):
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A10")
    multiplies_fp8.cache_clear()
    with pytest.raises(QuantizationError) as caught:
        require_fp8(device, instead)
    multiplies_fp8.cache_clear()
    assert str(caught.value).endswith(f"8.9 or later, A10 has 8.6; {instead}")
    require_fp8(torch.device("cpu"), instead)

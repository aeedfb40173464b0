"""fused_experts with weights in block fp8: torch on CPU, Triton on CUDA."""

import re
from typing import Any

import pytest
import torch
from tolerances import relative_difference
from torch import Tensor

from moezoo.errors import QuantizationError
from moezoo.layers.moe import Gating, chunks, fused_experts
from moezoo.layers.quant import BlockFp8
from moezoo.layers.quant.fp8 import quantize_rows

TOLERANCE = 3e-2
"""Largest difference over largest magnitude against the dequantised dense layer: a value of h that
the matrix units' 13 bits of fraction (Hopper) round to its neighbour in fp8 is off by an eighth,
and of many rows some have their largest among those."""

NORM_TOLERANCE = 1e-2
"""The same of the norms: few values do so, and bf16's own rounding is less."""

DENSE_TOLERANCE = 8e-2
"""The same against activations that are not quantised: two roundings to 4 bits (1/16 at most, 0.025
on average) that many terms average out."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 products")
    return torch.device(request.param)


def make(
    num_tokens: int,
    device: torch.device,
    *,
    k: int = 2,
    shape: tuple[int, int, int] = (6, 272, 144),
) -> dict[str, Any]:
    """Arguments of fused_experts; shape is (E, H, I)."""
    num_experts, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * size[-1] ** -0.5

    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :k]
    return {
        "x": (normal(num_tokens, hidden) * hidden**0.5).to(device, torch.bfloat16),
        "w13": BlockFp8.quantize(normal(num_experts, 2, intermediate, hidden).to(device)),
        "w2": BlockFp8.quantize(normal(num_experts, hidden, intermediate).to(device)),
        "topk_weights": torch.rand(num_tokens, k, generator=generator).to(device),
        "topk_ids": ids.int().to(device),
    }


def run(args: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return fused_experts(**args)


def dense(args: dict[str, Any], *, quantize: bool = True) -> Tensor:
    """Token by token in fp32 on dequantised weights."""

    def rounded(x: Tensor) -> Tensor:
        return quantize_rows(x[None]).dequantize()[0, : x.shape[-1]] if quantize else x

    w13, w2 = args["w13"].dequantize(), args["w2"].dequantize()
    out = torch.zeros_like(args["x"], dtype=torch.float32)
    expert_map = args.get("expert_map")
    gating = Gating.of(args.get("activation", "silu"))
    for t, ids in enumerate(args["topk_ids"].tolist()):
        for e, weight in zip(ids, args["topk_weights"][t], strict=True):
            e = e if expert_map is None or e < 0 else int(expert_map[e])
            if e < 0:
                continue
            gate, up = w13[e] @ rounded(args["x"][t].float())
            if args.get("bias13") is not None:
                gate, up = gate + args["bias13"][e, 0].float(), up + args["bias13"][e, 1].float()
            y = w2[e] @ rounded(gating(gate, up))
            if args.get("bias2") is not None:
                y = y + args["bias2"][e].float()
            out[t] += weight * y.to(args["x"].dtype).float()
    return out.to(args["x"].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40, 300])
def test_equals_the_dequantized_layer(
    num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    args = make(num_tokens, device)
    args["x"] = args["x"].to(dtype)
    out = run(args)
    assert out.dtype == dtype
    expected = dense(args)
    assert relative_difference(out, expected) <= TOLERANCE
    assert (out - expected).float().norm() <= NORM_TOLERANCE * expected.float().norm()
    assert relative_difference(out, dense(args, quantize=False)) <= DENSE_TOLERANCE
    assert torch.equal(out, run(args))


def test_absent_experts_maps_biases_and_gates(device: torch.device) -> None:
    args = make(40, device)
    generator = torch.Generator().manual_seed(1)
    args["topk_ids"][::3, 1] = -1
    args["topk_ids"][5] = -1
    args["expert_map"] = torch.tensor([3, -1, 0, 5, 1, 2], dtype=torch.int32, device=device)
    args["bias13"] = torch.randn(6, 2, 144, generator=generator).to(device, torch.bfloat16)
    args["bias2"] = torch.randn(6, 272, generator=generator).to(device, torch.bfloat16)
    args["activation"] = Gating("quick_gelu", limit=1.0, up_offset=1.0)
    for num_tokens in (40, 1):
        some = args | {n: args[n][:num_tokens] for n in ("x", "topk_weights", "topk_ids")}
        assert relative_difference(run(some), dense(some)) <= TOLERANCE


def test_all_on_one_and_none(device: torch.device) -> None:
    args = make(40, device)
    args["topk_ids"].fill_(4)
    args["topk_ids"][:, 1] = 2
    assert relative_difference(run(args), dense(args)) <= TOLERANCE
    args["topk_ids"].fill_(-1)
    assert not run(args).any()
    assert run(make(0, device)).shape == (0, 272)


def test_flat_w13_is_a_view(device: torch.device) -> None:
    args = make(7, device, shape=(4, 144, 256))
    w13 = args["w13"]
    flat = BlockFp8(w13.data.flatten(1, 2), w13.scales.flatten(1, 2))
    bias13 = torch.ones(4, 2, 256, device=device, dtype=torch.bfloat16)
    expected = run(args | {"bias13": bias13})
    assert torch.equal(run(args | {"w13": flat, "bias13": bias13.flatten(1)}), expected)


def test_a_tokens_result_does_not_depend_on_its_company(device: torch.device) -> None:
    args = make(300, device)
    alone = args | {n: args[n][:1] for n in ("x", "topk_weights", "topk_ids")}
    assert relative_difference(run(alone), run(args)[:1]) <= TOLERANCE


def test_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make(40, device)
    expected = run(args)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 16)
    assert relative_difference(run(args), expected) <= TOLERANCE


def operands(args: dict[str, Any]) -> tuple[Any, ...]:
    w13, w2 = args["w13"], args["w2"]
    return (
        *(args["x"], [w13.data, w13.scales], [w2.data, w2.scales]),
        *(args["topk_weights"], args["topk_ids"], "silu", None, None, None),
    )


def test_operator(device: torch.device) -> None:
    torch.library.opcheck(
        torch.ops.moezoo.fused_experts_block_fp8.default,
        operands(make(5, device)),
        # test_schema compares its inputs by arithmetic that torch has not for fp8.
        test_utils=("test_faketensor", "test_autograd_registration"),
    )


def test_compiles_into_one_graph(device: torch.device) -> None:
    args = make(5, device, shape=(4, 144, 256))
    args["w13"] = BlockFp8(args["w13"].data.flatten(1, 2), args["w13"].scales.flatten(1, 2))
    compiled = torch.compile(
        lambda **a: fused_experts(**a) + 1, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(**args), fused_experts(**args) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_cuda_graph(num_tokens: int) -> None:
    args = make(num_tokens, torch.device("cuda"))
    expected = run(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(args)
    graph.replay()
    assert torch.equal(out, expected)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2": torch.zeros(6, 272, 144)}, "must both be tensors or both of one format"),
        (
            {"w13": BlockFp8.quantize(torch.ones(6, 288, 272))},
            "has blocks that its 2 parts share; give [6, 2, 144, 272]",
        ),
        ({"w13": BlockFp8.quantize(torch.ones(6, 2, 144, 256))}, "w13 must be [6, 2, 144, 272]"),
        ({"x": torch.zeros(5, 272, dtype=torch.float64)}, "x must be [T, H] in float32"),
        ({"bias2": torch.zeros(6, 272)}, "bias2 must be [6, 272] torch.bfloat16"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(make(5, CPU) | change)


def test_refuses_a_gradient() -> None:
    args = make(5, CPU)
    args["x"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient through BlockFp8"):
        fused_experts(**args)


@pytest.mark.gpu
def test_refuses_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moezoo.layers.quant.fp8.multiplies_fp8", lambda device: False)
    with pytest.raises(QuantizationError, match=r"8\.9 or later.* for experts take a checkpoint"):
        run(make(5, torch.device("cuda")))

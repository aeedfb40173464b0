"""fused_experts with quantised weights: every format against its dequantised weights. Block fp8 has
more tests in test_block_fp8."""

import re
from typing import Any

import pytest
import torch
from gpu_memory import peak_bytes
from tolerances import RELATIVE, relative_difference
from torch import Tensor

from moezoo.layers.moe import FusedMoE, Gating, chunks, fused_experts, softmax_topk, workspace_bytes
from moezoo.layers.moe.experts_quantized import OPERATORS
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4
from moezoo.layers.quant.fp8 import quantize_rows

KINDS: dict[str, tuple[type[Format], dict[str, Any]]] = {
    "block-fp8": (BlockFp8, {}),
    "channel-fp8": (ChannelFp8, {}),
    "int8": (Int8, {}),
    "int8-groups": (Int8, {"group_size": 32}),
    "int8-zeros": (Int8, {"group_size": 32, "zeros": True}),
    "int8-rows": (Int8, {"zeros": True}),
    "int4": (Int4, {}),
    "int4-zeros": (Int4, {"zeros": True}),
    "int4-rows": (Int4, {"group_size": -1, "zeros": True}),
    "mxfp4": (Mxfp4, {}),
}
FP8_TOLERANCE = 3e-2
"""See test_block_fp8.TOLERANCE."""

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def quantized(kind: str, w: Tensor) -> Format:
    cls, options = KINDS[kind]
    return cls.quantize(w, **options)


def make(
    kind: str,
    num_tokens: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    k: int = 2,
    shape: tuple[int, int, int] = (6, 192, 96),
    parts: int = 2,
) -> dict[str, Any]:
    """Arguments of fused_experts; shape is (E, H, I)."""
    num_experts, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*size: int) -> Tensor:
        w = torch.randn(*size, generator=generator) * size[-1] ** -0.5
        return w.to(device, dtype)

    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :k]
    return {
        "x": normal(num_tokens, hidden) * hidden**0.5,
        "w13": quantized(kind, normal(num_experts, parts, intermediate, hidden)),
        "w2": quantized(kind, normal(num_experts, hidden, intermediate)),
        "topk_weights": torch.rand(num_tokens, k, generator=generator).to(device),
        "topk_ids": ids.int().to(device),
    }


def run(args: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return fused_experts(**args)


def dense(args: dict[str, Any]) -> Tensor:
    """Token by token in fp32 on dequantised weights, rounded where fused_experts rounds."""
    dtype = args["x"].dtype

    def rounded(x: Tensor) -> Tensor:
        if isinstance(args["w13"], BlockFp8 | ChannelFp8):
            return quantize_rows(x[None]).dequantize()[0, : x.shape[-1]]
        return x.to(dtype).float()

    w13, w2 = args["w13"].dequantize(), args["w2"].dequantize()
    out = torch.zeros_like(args["x"], dtype=torch.float32)
    expert_map = args.get("expert_map")
    gating = Gating.of(args.get("activation", "silu"))
    for t, ids in enumerate(args["topk_ids"].tolist()):
        for e, weight in zip(ids, args["topk_weights"][t], strict=True):
            e = e if expert_map is None or e < 0 else int(expert_map[e])
            if e < 0:
                continue
            parts = w13[e] @ rounded(args["x"][t].float())
            if args.get("bias13") is not None:
                parts = parts + args["bias13"][e].float()
            y = w2[e] @ rounded(gating(*parts))
            if args.get("bias2") is not None:
                y = y + args["bias2"][e].float()
            out[t] += weight * y.to(dtype).float()
    return out.to(dtype)


def check(args: dict[str, Any]) -> None:
    out, expected = run(args), dense(args)
    assert out.dtype == args["x"].dtype
    fp8 = isinstance(args["w13"], BlockFp8 | ChannelFp8)
    tolerance = FP8_TOLERANCE if fp8 else RELATIVE[out.dtype]
    assert relative_difference(out, expected) <= tolerance
    assert torch.equal(out, run(args))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_equals_the_dequantized_layer(
    kind: str, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(make(kind, num_tokens, device, dtype=dtype))


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 64, 300])
@pytest.mark.parametrize("shape", [(8, 2048, 768), (4, 1024, 1792), (4, 2880, 2880)], ids=str)
def test_sizes_of_models(kind: str, num_tokens: int, shape: tuple[int, int, int]) -> None:
    check(make(kind, num_tokens, torch.device("cuda"), shape=shape))


@kinds
def test_absent_experts_maps_biases_and_gates(kind: str, device: torch.device) -> None:
    args = make(kind, 40, device)
    generator = torch.Generator().manual_seed(1)
    args["topk_ids"][::3, 1] = -1
    args["topk_ids"][5] = -1
    args["expert_map"] = torch.tensor([3, -1, 0, 5, 1, 2], dtype=torch.int32, device=device)
    args["bias13"] = torch.randn(6, 2, 96, generator=generator).to(device, torch.bfloat16)
    args["bias2"] = torch.randn(6, 192, generator=generator).to(device, torch.bfloat16)
    args["activation"] = Gating("quick_gelu", limit=1.0, up_offset=1.0)
    for num_tokens in (40, 1):
        check(args | {n: args[n][:num_tokens] for n in ("x", "topk_weights", "topk_ids")})


@kinds
def test_without_a_gate(kind: str, device: torch.device) -> None:
    check(make(kind, 9, device, parts=1) | {"activation": "relu2"})


@kinds
def test_one_expert_and_none(kind: str, device: torch.device) -> None:
    check(make(kind, 9, device, k=1, shape=(1, 64, 32)))
    args = make(kind, 9, device)
    args["topk_ids"].fill_(4)
    args["topk_ids"][:, 1] = 2
    check(args)
    args["topk_ids"].fill_(-1)
    assert not run(args).any()
    assert run(make(kind, 0, device)).shape == (0, 192)
    for name in ("w13", "w2"):
        args[name] = args[name].map(lambda tensor: tensor[:0])
    assert not run(args).any()


@kinds
def test_flat_w13_is_a_view(kind: str, device: torch.device) -> None:
    args = make(kind, 7, device, shape=(4, 64, 128))
    flat = args["w13"].map(lambda tensor: tensor.flatten(1, 2))
    bias13 = torch.ones(4, 2, 128, device=device, dtype=torch.bfloat16)
    expected = run(args | {"bias13": bias13})
    assert torch.equal(run(args | {"w13": flat, "bias13": bias13.flatten(1)}), expected)


@kinds
def test_chunks(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make(kind, 40, device)
    expected = run(args)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 16)
    assert relative_difference(run(args), expected) <= FP8_TOLERANCE


@kinds
def test_bad_rows_stay_alone(kind: str, device: torch.device) -> None:
    args = make(kind, 40, device, dtype=torch.float16)
    expected = run(args)
    args["x"][7] = torch.nan
    args["x"][8] = torch.inf
    others = [t for t in range(40) if t not in (7, 8)]
    assert torch.equal(run(args)[others], expected[others])


@pytest.mark.parametrize("id_", [6, -2])
def test_ids_of_no_expert_are_refused(id_: int) -> None:
    args = make("int8", 5, torch.device("cpu"))
    args["topk_ids"][-1, 1] = id_
    with pytest.raises(ValueError, match=f"topk_ids has {id_}, expected 0 to "):
        run(args)


def ordered(cls: type[Int4] | type[Int8], w: Tensor, *, shared: bool) -> Int4 | Int8:
    """w [.., N, K] in groups of an order of its columns; gate and up may share theirs."""
    *leading, _, k = w.shape
    order = torch.rand(*leading, k, generator=torch.Generator().manual_seed(0)).argsort(-1)
    order = order.to(w.device)
    if shared and w.ndim == 4:
        order = order[:, :1].expand(order.shape)
    columns = w.gather(-1, order.unsqueeze(-2).expand(w.shape))
    q = cls.quantize(columns, group_size=32)
    return cls(q.data, q.scales, order=order.int().contiguous())


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("cls", [Int4, Int8])
def test_columns_in_an_order(
    cls: type[Int4] | type[Int8], num_tokens: int, shared: bool, device: torch.device
) -> None:
    args = make("int4", num_tokens, device)
    for name in ("w13", "w2"):
        args[name] = ordered(cls, args[name].dequantize(torch.bfloat16), shared=shared)
    check(args)


def check_replay(args: dict[str, Any]) -> None:
    """A captured run, replayed with other tokens that go to other experts, is as one that is not
    captured: the same kernels in both."""
    run(args)  # what is compiled or cached on the first run is not captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(args)
    first = run(args)
    args["x"].copy_(args["x"].flip(1) * 0.5)
    args["topk_ids"].copy_(torch.where(args["topk_ids"] < 0, -1, (args["topk_ids"] + 1) % 6))
    args["topk_weights"].copy_(args["topk_weights"].flip(1))
    graph.replay()
    expected = run(args)
    assert out.equal(expected) and not out.equal(first)


@pytest.mark.parametrize("name", ["shared", "apart"])
@pytest.mark.gpu
def test_columns_in_an_order_in_a_cuda_graph(name: str) -> None:
    args = make("int4", 5, torch.device("cuda"))
    for weight in ("w13", "w2"):
        w = args[weight].dequantize(torch.bfloat16)
        args[weight] = ordered(Int4, w, shared=name == "shared")
    args["topk_ids"][2] = -1
    check_replay(args)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_cuda_graph(kind: str, num_tokens: int) -> None:
    check_replay(make(kind, num_tokens, torch.device("cuda")))


@pytest.mark.gpu
@kinds
def test_cuda_needs_no_more_than_the_workspace(kind: str) -> None:
    args = make(kind, 1000, torch.device("cuda"), k=4, shape=(16, 512, 256))
    run(args)
    weights = type(args["w13"])
    sizes = {"intermediate_size": 256, "element_size": 2, "weights": weights}
    assert peak_bytes(lambda: run(args)) <= workspace_bytes(1000, 4, 512, **sizes) + 10 * 512


def test_workspace() -> None:
    def bytes_of(weights: type[Format] | None) -> int:
        sizes = {"intermediate_size": 768, "element_size": 2, "weights": weights}
        return workspace_bytes(100, 8, 2048, **sizes)

    assert bytes_of(Int4) == bytes_of(Mxfp4) == bytes_of(None) + 100 * 2048 * 2
    for cls in (BlockFp8, ChannelFp8):
        # An activation has a byte instead of two, with a scale for 128; tokens are there again.
        rows = 100 * 8 * (768 * 2 - 6 * 132)
        assert bytes_of(None) - bytes_of(cls) == rows - 100 * 16 * 132


@kinds
def test_operator(kind: str, device: torch.device) -> None:
    args = make(kind, 5, device)
    weights = (list(args[name].tensors().values()) for name in ("w13", "w2"))
    torch.library.opcheck(
        OPERATORS[type(args["w13"])],
        (args["x"], *weights, args["topk_weights"], args["topk_ids"], "silu", None, None, None),
        # test_schema compares its inputs by arithmetic that torch has not for fp8.
        test_utils=("test_faketensor", "test_autograd_registration"),
    )


@kinds
def test_compiles_into_one_graph(kind: str, device: torch.device) -> None:
    args = make(kind, 5, device, shape=(4, 128, 128))
    args["w13"] = args["w13"].map(lambda tensor: tensor.flatten(1, 2))
    torch.compiler.reset()  # or the formats of other tests count as many recompilations
    compiled = torch.compile(
        lambda **a: fused_experts(**a) + 1, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(**args), fused_experts(**args) + 1)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2": torch.zeros(6, 192, 96)}, "of one format, got Int4 and Tensor"),
        ({"w2": Int8.quantize(torch.ones(6, 192, 96))}, "of one format, got Int4 and Int8"),
        ({"w13": Int4.quantize(torch.ones(6, 2, 96, 128))}, "w13 must be [6, 2, 96, 192] Int4 on"),
        ({"x": torch.zeros(5, 192, dtype=torch.float64)}, "x must be [T, H] in float32"),
        ({"bias2": torch.zeros(6, 192)}, "bias2 must be [6, 192] torch.bfloat16"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(make("int4", 5, CPU) | change)


@kinds
def test_refuses_a_gradient(kind: str) -> None:
    args = make(kind, 5, CPU)
    args["x"].requires_grad_()
    name = type(args["w13"]).__name__
    with pytest.raises(ValueError, match=f"no gradient through {name}"):
        fused_experts(**args)


@kinds
def test_layer(kind: str) -> None:
    torch.manual_seed(0)
    layer = FusedMoE(64, 32, 4, lambda logits: softmax_topk(logits, 2, renormalize=True))
    layer.requires_grad_(False).reset_parameters()
    x = torch.randn(3, 5, 64)
    before, (w13, w2) = layer(x), (layer.w13, layer.w2)
    assert layer.quantized is None
    layer.quantize_(quantized(kind, w13.unflatten(1, (2, -1))), quantized(kind, w2))
    cls = KINDS[kind][0]
    assert layer.quantized is cls
    assert f"E=4, silu, {cls.name}" in repr(layer)
    after = layer(x)
    assert 0 < (after - before).norm() <= 0.25 * before.norm()
    assert torch.equal(layer.bfloat16().w13().dequantize(), layer.w13().dequantize())


def test_layer_refuses() -> None:
    layer = FusedMoE(64, 32, 4, lambda logits: softmax_topk(logits, 2, renormalize=True))
    w13, w2 = torch.ones(4, 2, 32, 64), torch.ones(4, 64, 32)
    with pytest.raises(ValueError, match="must be of one format, got Int8 and Int4"):
        layer.quantize_(Int8.quantize(w13), Int4.quantize(w2))
    with pytest.raises(ValueError, match=re.escape("must be [4, 2, 32, 64] and [4, 64, 32], got")):
        layer.quantize_(Int8.quantize(w2), Int8.quantize(w2))


@pytest.mark.parametrize("given", [None, torch.ones(4, 2, 64, 32)], ids=["none", "tensor"])
def test_what_is_of_no_format_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"w13 is a .*, expected weights of a format"):
        FusedMoE(32, 64, 4, None).quantize_(given, given)

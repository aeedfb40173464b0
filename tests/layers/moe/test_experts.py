"""fused_experts against a naive loop, on every device: torch on CPU, Triton on CUDA."""

import re
from typing import Any

import pytest
import torch
from gpu_memory import peak_bytes
from tolerances import RELATIVE, assert_close, relative_difference
from torch import Tensor

from moezoo.layers.moe import (
    ACTIVATIONS,
    Gating,
    batches,
    chunks,
    experts_dense,
    fused_experts,
    workspace_bytes,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def make(
    num_tokens: int, k: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Arguments of fused_experts; shape is (E, H, I)."""
    num_experts, hidden, intermediate = shape
    generator = torch.Generator(device).manual_seed(num_tokens + 7 * k)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    scores = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    weights, ids = (t[:, :k].contiguous() for t in scores.sort(-1, descending=True))
    return {
        "x": normal(num_tokens, hidden),
        "w13": normal(num_experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        "w2": normal(num_experts, hidden, intermediate, scale=intermediate**-0.5),
        "topk_weights": weights,
        "topk_ids": ids.int(),
    }


def naive(args: dict[str, Any]) -> Tensor:
    """Token by token, expert by expert, rounded where DESIGN says so."""
    x, w13, w2 = args["x"], args["w13"].float(), args["w2"].float()
    out = torch.zeros_like(x, dtype=torch.float32)
    expert_map = args.get("expert_map")
    for t, (ids, weights) in enumerate(
        zip(args["topk_ids"].tolist(), args["topk_weights"], strict=True)
    ):
        for e, weight in zip(ids, weights, strict=True):
            e = e if expert_map is None or e < 0 else int(expert_map[e])
            if e < 0:
                continue
            gate_up = w13[e] @ x[t].float()
            if args.get("bias13") is not None:
                gate_up = gate_up + args["bias13"][e].float()
            gating = Gating.of(args.get("activation", "silu"))
            gate, up = gate_up.chunk(2)
            h = gating(gate, up).to(x.dtype)
            y = w2[e] @ h.float()
            if args.get("bias2") is not None:
                y = y + args["bias2"][e].float()
            out[t] += weight * y.to(x.dtype).float()
    return out.to(x.dtype)


def run(args: dict[str, Any]) -> Tensor:
    keywords = {"activation", "bias13", "bias2", "expert_map"} & args.keys()
    positional = (args[n] for n in ("x", "w13", "w2", "topk_weights", "topk_ids"))
    return fused_experts(*positional, **{name: args[name] for name in keywords})


@pytest.mark.parametrize(
    ("num_tokens", "k", "shape"),
    [
        (0, 2, (4, 16, 8)),
        (1, 1, (1, 16, 8)),
        (1, 3, (5, 33, 17)),
        (2, 2, (64, 48, 24)),
        (7, 5, (5, 33, 17)),
        (63, 2, (8, 64, 32)),
        (130, 1, (3, 40, 72)),
        (96, 4, (4, 320, 272)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_equals_a_naive_loop(
    num_tokens: int,
    k: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    args = make(num_tokens, k, shape, dtype, device)
    assert_close(run(args), naive(args))


@pytest.mark.parametrize("num_tokens", [1, 6, 40])
def test_biases(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    args = make(num_tokens, 2, (4, 24, 16), dtype, device)
    args["bias13"] = torch.randn(4, 32, device=device).to(dtype)
    args["bias2"] = torch.randn(4, 24, device=device).to(dtype)
    assert_close(run(args), naive(args))


@pytest.mark.parametrize(
    "activation",
    [
        *sorted(ACTIVATIONS),
        Gating("silu", limit=2.0),
        Gating("quick_gelu", limit=1.5, up_offset=1.0),
    ],
    ids=str,
)
def test_activations(activation: str | Gating, device: torch.device) -> None:
    args = make(9, 2, (4, 24, 16), torch.float32, device)
    args["x"] *= 3
    assert_close(run(args | {"activation": activation}), naive(args | {"activation": activation}))


@pytest.mark.parametrize("num_tokens", [1, 12, 100])
def test_an_absent_expert_contributes_nothing(
    num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    args = make(num_tokens, 3, (6, 24, 16), dtype, device)
    args["topk_ids"][::2, 1] = -1
    args["topk_ids"][0] = -1
    args["topk_weights"][args["topk_ids"] < 0] = torch.nan
    result = run(args)
    assert_close(result, naive(args))
    assert not result[0].any()


@pytest.mark.parametrize("num_tokens", [1, 12])
def test_expert_map(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    args = make(num_tokens, 3, (6, 24, 16), dtype, device)
    whole = run(args)
    parts = []
    for ours in ([4, 0], [1, 2, 3, 5]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[ours] = torch.arange(len(ours), dtype=torch.int32)
        local = {"w13": args["w13"][ours], "w2": args["w2"][ours]}
        part = args | local | {"expert_map": expert_map.to(device)}
        assert_close(run(part), naive(part))
        parts.append(run(part).float())
    # The parts are rounded before they are added.
    assert relative_difference(parts[0] + parts[1], whole) <= 2 * RELATIVE[dtype]


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_a_rank_without_experts_contributes_nothing(num_tokens: int, device: torch.device) -> None:
    args = make(num_tokens, 2, (4, 24, 16), torch.float32, device)
    args |= {"w13": args["w13"][:0], "w2": args["w2"][:0]}
    args["expert_map"] = torch.full((4,), -1, dtype=torch.int32, device=device)
    assert torch.equal(run(args), torch.zeros_like(args["x"]))


def test_strided_arguments(device: torch.device) -> None:
    args = make(10, 2, (4, 24, 16), torch.float32, device)
    expected = run(args)
    args["x"] = args["x"].repeat_interleave(2, 1)[:, ::2]
    args["w13"] = args["w13"].mT.contiguous().mT
    args["w2"] = args["w2"].mT.contiguous().mT
    args["topk_weights"] = args["topk_weights"].mT.contiguous().mT
    args["topk_ids"] = args["topk_ids"].long().mT.contiguous().mT
    assert_close(run(args), expected)


@pytest.mark.parametrize("num_tokens", [1, 10])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_gate_and_up_rows_alternate(
    transposed: bool, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    args = make(num_tokens, 2, (4, 24, 16), dtype, device)
    args["bias13"] = torch.randn(4, 32, device=device).to(dtype)
    expected = run(args)
    stored = args["w13"].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if transposed:
        stored = stored.mT.contiguous().mT
    args["w13"] = stored.unflatten(1, (-1, 2)).transpose(1, 2)
    args["bias13"] = args["bias13"].unflatten(1, (2, -1)).mT.contiguous().mT
    assert_close(run(args), expected)


def test_halves_anywhere_in_memory(device: torch.device) -> None:
    args = make(10, 2, (4, 24, 16), torch.float32, device)
    expected = run(args)
    halves = args["w13"].unflatten(1, (2, -1))
    assert_close(run(args | {"w13": halves}), expected)
    apart = torch.stack([halves[:, 0], halves[:, 0], halves[:, 1]], 1)[:, ::2]
    assert_close(run(args | {"w13": apart}), expected)


@pytest.mark.parametrize("num_tokens", [1, 10])
def test_without_a_gate(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    args = make(num_tokens, 2, (4, 24, 16), dtype, device) | {"activation": "relu2"}
    bias = torch.randn(4, 16, device=device).to(dtype)
    result = run(args | {"w13": args["w13"][:, None, :16], "bias13": bias.unsqueeze(1)})
    # relu2(x) is what a gate by relu makes of x twice.
    args["w13"] = args["w13"][:, :16].repeat(1, 2, 1)
    assert_close(result, naive(args | {"activation": "relu", "bias13": bias.repeat(1, 2)}))


def test_a_bad_token_touches_no_other(device: torch.device) -> None:
    args = make(40, 2, (4, 24, 16), torch.float32, device)
    expected = run(args)
    args["x"][7] = torch.nan
    args["x"][8] = torch.inf
    others = [t for t in range(40) if t not in (7, 8)]
    assert torch.equal(run(args)[others], expected[others])


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("id_", [4, -2])
def test_ids_of_no_expert_are_refused(num_tokens: int, id_: int) -> None:
    args = make(num_tokens, 2, (4, 24, 16), torch.float32, torch.device("cpu"))
    args["topk_ids"][-1, 1] = id_
    with pytest.raises(ValueError, match=f"topk_ids has {id_}, expected 0 to 3, or -1"):
        run(args)


def test_works_in_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make(45, 2, (4, 24, 16), torch.float32, device)
    expected = naive(args)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 20)
    assert_close(run(args), expected)
    monkeypatch.setattr(batches, "BATCH_ROWS", 1)
    assert_close(run(args), expected)


def test_same_bits_every_time(dtype: torch.dtype, device: torch.device) -> None:
    args = make(300, 4, (16, 64, 48), dtype, device)
    first = run(args)
    assert all(torch.equal(run(args), first) for _ in range(5))


@pytest.mark.parametrize("num_tokens", [1, 2, 30])
def test_gradients(num_tokens: int) -> None:
    args = make(num_tokens, 2, (4, 6, 5), torch.float32, torch.device("cpu"))
    leaves = ("x", "w13", "w2", "topk_weights")
    for name in leaves:
        args[name].requires_grad_()
    seed = torch.randn(num_tokens, 6)
    grads = torch.autograd.grad(run(args), [args[n] for n in leaves], seed)

    def dense(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor) -> Tensor:
        gate, up = torch.einsum("th,enh->ten", x, w13).chunk(2, -1)
        y = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w2)
        weights = torch.zeros(num_tokens, 4).scatter(1, args["topk_ids"].long(), topk_weights)
        return torch.einsum("te,teh->th", weights, y)

    inputs = [args[n] for n in leaves]
    expected = torch.autograd.grad(dense(*inputs), inputs, seed)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad)


def test_operator(device: torch.device) -> None:
    args = make(5, 2, (4, 24, 16), torch.float32, device)
    positional = [args[n] for n in ("x", "w13", "w2", "topk_weights", "topk_ids")]
    torch.library.opcheck(
        torch.ops.moezoo.fused_experts.default,
        (*positional, "silu", None, None, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_compiles_into_one_graph(device: torch.device) -> None:
    args = make(5, 2, (4, 24, 16), torch.float32, device)
    positional = [args[n] for n in ("x", "w13", "w2", "topk_weights", "topk_ids")]
    compiled = torch.compile(
        lambda *a: fused_experts(*a, activation="gelu") + 1, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        expected = fused_experts(*positional, activation="gelu") + 1
        assert torch.equal(compiled(*positional), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 24, dtype=torch.float64)}, "x must be [T, H] in float32"),
        ({"x": torch.zeros(24)}, "x must be [T, H]"),
        ({"w2": torch.zeros(4, 24)}, "w2 must be [E, H, I]"),
        ({"w13": torch.zeros(4, 16, 24)}, "w13 must be [4, 32, 24]"),
        ({"w13": torch.zeros(4, 32, 24, dtype=torch.float16)}, "got [4, 32, 24] torch.float16"),
        ({"topk_ids": torch.zeros(5, 2)}, "topk_ids must be int32 or int64"),
        ({"topk_ids": torch.zeros(6, 2, dtype=torch.int32)}, "topk_ids must be [5, 2]"),
        ({"topk_weights": torch.zeros(5, 3)}, "topk_weights must be [5, 2]"),
        ({"topk_weights": torch.zeros(5, 2).half()}, "topk_weights must be [5, 2] torch.float32"),
        ({"bias13": torch.zeros(4, 16)}, "bias13 must be [4, 32]"),
        ({"bias2": torch.zeros(4, 16)}, "bias2 must be [4, 24]"),
        ({"expert_map": torch.zeros(6)}, "expert_map must be [E] torch.int32"),
        ({"w13": torch.zeros(4, 3, 16, 24)}, "w13 must be [4, 2, 16, 24]"),
        ({"w13": torch.zeros(4, 1, 8, 24)}, "w13 must be [4, 1, 16, 24]"),
        (
            {"w13": torch.zeros(4, 1, 16, 24), "activation": Gating(limit=7.0)},
            "has no gate that Gating(activation='silu', limit=7.0, up_offset=0.0) could bound",
        ),
        (
            {"w13": torch.zeros(4, 2, 16, 24), "bias13": torch.zeros(4, 32)},
            "bias13 must be [4, 2, 16]",
        ),
        ({"w2": torch.zeros(4, 24, 16, device="meta")}, "w2 must be [4, 24, 16]"),
        ({"activation": "tanh"}, "activation must be one of ['gelu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    args = make(5, 2, (4, 24, 16), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(args | change)


def test_workspace_is_bounded() -> None:
    def size(num_tokens: int) -> int:
        return workspace_bytes(num_tokens, 8, 2048, intermediate_size=768, element_size=2)

    limit = chunks.CHUNK_TOKENS
    assert size(100) == 100 * (8 * ((2048 + 768) * 2 + 8) + 2048 * 2)
    assert size(3 * limit) == size(limit) + 5 * limit * 2048 * 2


CUDA = torch.device("cuda")
MODELS = {
    "qwen3": (8, (128, 2048, 768)),
    "mixtral": (2, (8, 1024, 3584)),
    "odd": (3, (7, 200, 136)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4, 17, 64, 300, 1024, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_cuda_equals_torch(model: str, num_tokens: int, dtype: torch.dtype) -> None:
    k, shape = MODELS[model]
    args = make(num_tokens, k, shape, dtype, CUDA)
    exact = {n: t.float() if t.dtype == dtype else t for n, t in args.items()}
    expected = experts_dense.dense_torch(
        *(exact[n] for n in ("x", "w13", "w2", "topk_weights", "topk_ids")),
        "silu",
        None,
        None,
        None,
    )
    assert_close(run(args), expected.to(dtype))


@pytest.mark.gpu
def test_no_tokens_on_layers_of_the_tables() -> None:
    args = make(1, 8, (128, 2048, 768), torch.bfloat16, CUDA)
    for name in ("x", "topk_weights", "topk_ids"):
        args[name] = args[name][:0]
    assert run(args).shape == (0, 2048)


@pytest.mark.gpu
def test_cuda_does_not_synchronize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 20)
    args = make(33, 2, (4, 64, 32), torch.bfloat16, CUDA)
    args["expert_map"] = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=CUDA)
    args["w13"], args["w2"] = args["w13"][:3], args["w2"][:3]
    expected = run(args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 500])
def test_cuda_graph_replays_to_the_same_bits(num_tokens: int, dtype: torch.dtype) -> None:
    args = make(num_tokens, 4, (16, 256, 128), dtype, CUDA)
    run(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(args)
    for seed in (1, 2):
        new = make(num_tokens, 4, (16, 256, 128), dtype, CUDA)
        torch.manual_seed(seed)
        new["x"] = torch.randn_like(new["x"])
        new["topk_ids"] = torch.rand(num_tokens, 16, device=CUDA).argsort(-1)[:, :4].int()
        args["x"].copy_(new["x"])
        args["topk_ids"].copy_(new["topk_ids"])
        graph.replay()
        assert torch.equal(captured, run(args))
        assert_close(captured, run(new))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_torch_grouped_product_gives_the_bits_of_the_loop(
    gated: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_dense, "ONEDNN_DTYPES", ())
    args = make(7, 3, (8, 40, 24), dtype, torch.device("cpu"))
    if not gated:
        args["w13"] = args["w13"][:, None, :24].contiguous()
    args["topk_ids"][2, 1] = -1
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k)
    )
    with torch.no_grad():
        out = run(args)
        assert len(calls) == 2
        monkeypatch.setattr(experts_dense, "FP32_ROWS", 0)
        assert torch.equal(out, run(args))
    assert len(calls) == 2
    assert_close(run(args), out)  # with a gradient enabled, the loop again


@pytest.mark.gpu
def test_cuda_needs_no_more_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 256)
    args = make(1000, 4, (16, 512, 256), torch.bfloat16, CUDA)
    run(args)
    allowed = workspace_bytes(1000, 4, 512, intermediate_size=256, element_size=2) + 10 * 512
    assert peak_bytes(lambda: run(args)) <= allowed


@pytest.mark.gpu
def test_cuda_gradients_are_those_of_the_cpu() -> None:
    args = make(30, 2, (4, 24, 16), torch.float32, torch.device("cpu"))
    leaves = ("x", "w13", "w2", "topk_weights")

    def gradients(device: torch.device) -> tuple[Tensor, ...]:
        moved = {name: tensor.to(device) for name, tensor in args.items()}
        inputs = [moved[name].requires_grad_() for name in leaves]
        return torch.autograd.grad(run(moved).square().sum(), inputs)

    with pytest.warns(UserWarning, match="fused_experts computes a gradient"):
        on_cuda = gradients(CUDA)
    for actual, expected in zip(on_cuda, gradients(args["x"].device), strict=True):
        assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "chosen", "products"),
    [
        (40, "any", 4),  # one batch after the other
        (40, "half", 2),  # some experts without rows, and absent ones
        (40, "popular", 2),  # one expert alone, and a batch without it
        (40, "one", 0),  # nothing to put together
        (3, "any", 0),  # so few that the weights of all would be too much to read
        (40, "unlike", 0),  # mostly padding
    ],
)
@torch.no_grad()
def test_small_experts_in_one_batch_on_the_cpu(
    num_tokens: int, chosen: str, products: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_dense, "ONEDNN_DTYPES", (dtype,))
    monkeypatch.setattr(batches, "PADDED_ROWS", 40)
    args = make(num_tokens, 2, (16, 24, 16), dtype, torch.device("cpu"))
    if chosen == "half":
        args["topk_ids"] = args["topk_ids"] % 8 - 1
        args["topk_ids"][::2] = -1
    elif chosen == "popular":
        args["topk_ids"][:, 1] = 3
        monkeypatch.setattr(batches, "PADDED_ROWS", 80)
        monkeypatch.setattr(batches, "PADDED_PRODUCTS", 2**14)
    elif chosen == "one":
        args["topk_ids"][:] = 3
    elif chosen == "unlike":
        args["topk_ids"][:] = torch.tensor([3, 4])
        args["topk_ids"][:4] = 5
        monkeypatch.setattr(batches, "PADDED_PRODUCTS", 2**10)
    args |= {"bias13": torch.randn(16, 32).to(dtype), "bias2": torch.randn(16, 24).to(dtype)}
    calls = []
    batched = experts_dense._batched_linear
    monkeypatch.setattr(
        experts_dense, "_batched_linear", lambda *a: calls.append(a[0]) or batched(*a)
    )
    expected = naive(args)
    assert_close(run(args), expected)
    assert len(calls) == products
    args["w13"], args["w2"] = (args[name].mT.contiguous().mT for name in ("w13", "w2"))
    assert_close(run(args), expected)

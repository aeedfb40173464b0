import pytest
import torch

from moezoo.layers.kernels import few_tokens
from moezoo.layers.mlp import GatedMLP, SigmoidGatedMLP
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import Int8


def layer(kind: type[GatedMLP], device: str = "cpu") -> GatedMLP:
    torch.manual_seed(0)
    return kind(24, 40, activation="silu").to(device)


@pytest.mark.parametrize("kind", [GatedMLP, SigmoidGatedMLP])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [1, 3, 7, 90])
@torch.inference_mode()
def test_addend(kind: type[GatedMLP], device: str, tokens: int) -> None:
    mlp = layer(kind, device)
    x = torch.randn(1, tokens, 24, device=device)
    addend = torch.randn(1, tokens, 24, device=device)
    gates, ups = torch.nn.functional.linear(x, mlp.gate_up.weight).chunk(2, -1)
    expected = torch.nn.functional.linear(torch.nn.functional.silu(gates) * ups, mlp.down.weight)
    if isinstance(mlp, SigmoidGatedMLP):
        expected = expected * torch.sigmoid(x @ mlp.gate.weight.T)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    total = expected + addend
    y = mlp(x, addend)
    torch.testing.assert_close(y, total, rtol=1e-4, atol=1e-5)
    if device == "cpu" or tokens == 90:
        in_place = device == "cuda" and kind is GatedMLP
        assert (y.data_ptr() == addend.data_ptr()) == in_place


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.inference_mode()
def test_addend_of_many_rows_and_a_bias(device: str) -> None:
    mlp = GatedMLP(24, 40, activation="silu", bias=True).to(device)
    for part in (mlp.gate_up, mlp.down):
        torch.nn.init.normal_(part.bias)
    x, addend = torch.randn(2, 90, 24, device=device)
    total = mlp(x) + addend
    torch.testing.assert_close(mlp(x, addend), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.inference_mode()
def test_width_0(device: str) -> None:
    mlp = GatedMLP(24, 0, activation="silu", bias=True).to(device, torch.bfloat16)
    for tokens in (1, 7):
        x, addend = torch.randn(2, tokens, 24, device=device, dtype=torch.bfloat16)
        assert mlp(x).equal(mlp.down.bias.expand(tokens, 24))
        assert mlp(x, addend).equal(mlp.down.bias + addend)


class Doubled(GatedMLP):
    def forward(self, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * super().forward(x) + (0 if addend is None else addend)


class Wrapped(torch.nn.Module):
    """As libraries of adapters wrap a linear layer."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.inner.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.inner(x)


def of_one_expert(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.topk(1)
    return weights.softmax(-1), ids.int()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "change", "together"),
    [
        (GatedMLP, "none", True),
        (SigmoidGatedMLP, "none", True),
        (GatedMLP, "a hook within", False),
        (GatedMLP, "another activation", False),
        (GatedMLP, "a bias", False),
        (GatedMLP, "int8", False),
        (GatedMLP, "two tokens", False),
        (GatedMLP, "another layer within", False),
        (Doubled, "none", False),
    ],
)
@torch.inference_mode()
def test_beside_the_experts_of_one_token(
    kind: type[GatedMLP], change: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the CPU; in the launches of the routed experts only where nothing is lost by it."""
    shared = layer(kind)
    if change == "another activation":
        shared.activation = "gelu"
    elif change == "a bias":
        shared.down.bias = torch.nn.Parameter(torch.randn(24))
    elif change == "another layer within":
        shared.down = Wrapped(shared.down)
    elif change == "int8":
        shared.down.quantize_(Int8.quantize(shared.down.weight))
    moe = FusedMoE(24, 8, 4, of_one_expert, shared=shared)
    moe.reset_parameters()
    x = torch.randn(2 if change == "two tokens" else 1, 24)
    expected = moe(x)
    seen = []
    if change == "a hook within":
        shared.down.register_forward_hook(lambda *call: seen.append(call))
    calls = []
    monkeypatch.setattr(few_tokens, "_check_shared", lambda *shared: calls.append(shared))
    torch.testing.assert_close(moe.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
    assert bool(calls) == together
    assert len(seen) == (change == "a hook within")


@torch.inference_mode()
def test_a_hook_sees_what_the_shared_expert_computes() -> None:
    shared = layer(GatedMLP)
    moe = FusedMoE(24, 8, 4, of_one_expert, shared=shared)
    moe.reset_parameters()
    x = torch.randn(5, 24)
    whole = moe(x)
    seen = []
    shared.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(moe(x), whole)
    torch.testing.assert_close(seen[0], shared(x))

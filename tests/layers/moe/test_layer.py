"""FusedMoE against transformers' blocks with the same weights."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, relative_difference
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moezoo.layers.moe import (
    Arrival,
    BiasedLogits,
    BiasedRoute,
    FusedMoE,
    Gating,
    grouped_topk,
    softmax_topk,
)
from moezoo.layers.quant import Format, Int4, Int8, Mxfp4

H, I, E, K = 24, 20, 12, 3
SIZES = {"hidden_size": H, "num_experts_per_tok": K, "num_attention_heads": 2}
GROUPS = {"n_routed_experts": E, "n_group": 4, "topk_group": 2, "moe_intermediate_size": I}


class GatedShared(nn.Module):
    """Qwen2-MoE's shared expert, made of transformers' own parts."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.expert(x)


def ours(theirs: nn.Module, route: Callable[..., Any], activation: str = "silu") -> FusedMoE:
    """A FusedMoE with the weights of a transformers block."""
    shared = getattr(theirs, "shared_experts", None)
    if hasattr(theirs, "shared_expert"):
        shared = GatedShared(theirs.shared_expert, theirs.shared_expert_gate)
    if hasattr(theirs.gate, "e_score_correction_bias"):
        route = BiasedRoute(E, route)
        route.correction_bias.data.copy_(theirs.gate.e_score_correction_bias)
    moe = FusedMoE(H, I, E, route, shared=shared, activation=activation)
    moe.gate.data.copy_(theirs.gate.weight)
    moe.w13.data.copy_(theirs.experts.gate_up_proj)
    moe.w2.data.copy_(theirs.experts.down_proj)
    return moe


SOFTMAX = partial(softmax_topk, k=K)
GROUPED = partial(grouped_topk, k=K, num_groups=4, topk_groups=2)


@pytest.mark.parametrize(
    ("block", "config", "route"),
    [
        pytest.param(
            MixtralSparseMoeBlock,
            MixtralConfig(**SIZES, intermediate_size=I, num_local_experts=E),
            partial(SOFTMAX, renormalize=True),
            id="mixtral",
        ),
        pytest.param(
            Qwen2MoeSparseMoeBlock,
            Qwen2MoeConfig(
                **SIZES,
                moe_intermediate_size=I,
                shared_expert_intermediate_size=2 * I,
                num_experts=E,
                norm_topk_prob=False,
            ),
            partial(SOFTMAX, renormalize=False),
            id="qwen2_moe",
        ),
        pytest.param(
            Qwen3MoeSparseMoeBlock,
            Qwen3MoeConfig(
                **SIZES,
                moe_intermediate_size=I,
                num_experts=E,
                norm_topk_prob=True,
                hidden_act="gelu_pytorch_tanh",
            ),
            partial(SOFTMAX, renormalize=True),
            id="qwen3_moe-gelu",
        ),
        pytest.param(
            OlmoeSparseMoeBlock,
            OlmoeConfig(**SIZES, intermediate_size=I, num_experts=E),
            partial(SOFTMAX, renormalize=False),
            id="olmoe",
        ),
        pytest.param(
            DeepseekV2Moe,
            DeepseekV2Config(
                **SIZES,
                **GROUPS,
                topk_method="group_limited_greedy",
                routed_scaling_factor=16.0,
                n_shared_experts=2,
            ),
            partial(GROUPED, renormalize=False, scaling=16.0),
            id="deepseek_v2",
        ),
        pytest.param(
            DeepseekV3MoE,
            DeepseekV3Config(**SIZES, **GROUPS, routed_scaling_factor=2.5, n_shared_experts=1),
            partial(GROUPED, scoring="sigmoid", renormalize=True, scaling=2.5),
            id="deepseek_v3",
        ),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, H), (2, 9, H), (3, H)], ids=str)
def test_equals_transformers(
    block: type[nn.Module], config: Any, route: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    theirs = block(config)
    for name, tensor in theirs.state_dict().items():
        nn.init.normal_(tensor, std=1.0 if name == "gate.weight" else 0.2)
    x = torch.randn(shape)
    moe = ours(theirs, route, config.hidden_act)
    with torch.no_grad():
        assert_close(moe(x), theirs(x.view(1, -1, H)).view(shape))


def test_routes_in_fp32() -> None:
    """Two experts whose logits differ by less than a step of bf16 are still told apart."""
    moe = FusedMoE(2, 4, 2, partial(softmax_topk, k=1, renormalize=True)).bfloat16()
    moe.reset_parameters()
    moe.gate.data = torch.tensor([[256.0, 0.0], [256.0, 0.5]]).bfloat16()
    logits = moe.router_logits(torch.ones(1, 2).bfloat16())
    assert logits.tolist() == [[256.0, 256.5]]
    moe.w13.data[0] = torch.nan
    assert moe(torch.ones(1, 2).bfloat16()).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_on_cuda_are_those_of_fp32(dtype: torch.dtype, num_tokens: int) -> None:
    torch.manual_seed(0)
    moe = FusedMoE(2048, 4, 60, partial(softmax_topk, k=1, renormalize=True)).to("cuda", dtype)
    moe.reset_parameters()
    x = torch.randn(num_tokens, 2048, device="cuda").to(dtype)
    with torch.no_grad():
        logits = moe.router_logits(x)
    assert logits.dtype == torch.float32
    # Matrix units cut off the last bit of a sum where others round it.
    expected = F.linear(x.double(), moe.gate.double())
    assert relative_difference(logits, expected) <= 5e-5


def gpt_oss(hidden: int = H, intermediate: int = I) -> tuple[FusedMoE, GptOssMLP]:
    """Both with the same random weights and biases, large enough for the limit to matter."""
    config = GptOssConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=E,
        num_experts_per_tok=K,
    )
    torch.manual_seed(0)
    theirs = GptOssMLP(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    moe = FusedMoE(
        *(hidden, intermediate, E),
        BiasedLogits(E, partial(SOFTMAX, renormalize=True)),
        activation=Gating("quick_gelu", limit=7.0, up_offset=1.0),
        bias=True,
    )

    def halves(interleaved: Tensor) -> Tensor:
        return torch.cat((interleaved[..., ::2], interleaved[..., 1::2]), -1)

    experts = theirs.experts
    state = {
        "gate": theirs.router.weight,
        "route.bias": theirs.router.bias,
        "w13": halves(experts.gate_up_proj).mT,
        "bias13": halves(experts.gate_up_proj_bias),
        "w2": experts.down_proj.mT,
        "bias2": experts.down_proj_bias,
    }
    moe.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return moe, theirs


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 9, 80])
@torch.no_grad()
def test_biases_as_gpt_oss_has_them(tokens: int, device: str) -> None:
    moe, theirs = gpt_oss()
    x = torch.randn(1, tokens, H)
    expected, _ = theirs(x)
    assert_close(moe.to(device)(x.to(device)).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format_", [Int8, Int4, Mxfp4])
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_biases_beside_quantised_experts(format_: type[Format], tokens: int, device: str) -> None:
    moe, theirs = gpt_oss(64, 32)
    w13, w2 = format_.quantize(moe.w13.unflatten(1, (2, -1))), format_.quantize(moe.w2)
    moe.quantize_(w13, w2)
    experts = theirs.experts
    experts.gate_up_proj.copy_(w13.dequantize().transpose(1, 2).flatten(1, 2).mT)
    experts.down_proj.copy_(w2.dequantize().mT)
    x = torch.randn(1, tokens, 64)
    expected, _ = theirs(x)
    assert_close(moe.to(device)(x.to(device)).cpu(), expected)


def test_correction_bias_keeps_its_dtype() -> None:
    assert BiasedRoute.keep_dtype == ("correction_bias",)
    route = BiasedRoute(4, partial(grouped_topk, k=1, num_groups=1, topk_groups=1))
    assert route.correction_bias.dtype == torch.float32
    assert not route.correction_bias.requires_grad
    moe = FusedMoE(2, 4, 4, route)
    assert set(moe.state_dict()) == {"gate", "w13", "w2", "route.correction_bias"}


def test_reset_parameters() -> None:
    route = BiasedRoute(40, partial(grouped_topk, k=1, num_groups=1, topk_groups=1))
    moe = FusedMoE(30, 20, 40, route)
    moe.reset_parameters()
    route.reset_parameters()
    for parameter in (moe.gate, moe.w13, moe.w2):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
    assert not route.correction_bias.any()


def test_reset_of_biases() -> None:
    moe = FusedMoE(H, I, E, BiasedLogits(E, partial(SOFTMAX, renormalize=True)), bias=True)
    moe.reset_parameters()
    moe.route.reset_parameters()
    for bias in (moe.bias13, moe.bias2, moe.route.bias):
        assert not bias.any()


class HalfOfTheExperts:
    """A dispatcher for two ranks in one process: tokens go nowhere, this rank has every other
    expert. They arrive in two parts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[str] = []

    def dispatch(self, x: Tensor, topk_weights: Tensor, slots: Tensor) -> "HalfOfTheExperts":
        rows = torch.where(slots % 2 == self.rank, slots // 2, -1)
        parts = (tensor.split(7) for tensor in (x, topk_weights, rows))
        self.parts = [Arrival(*part) for part in zip(*parts, strict=True)]
        self.answers: list[Tensor] = []
        return self

    def arrivals(self) -> Iterator[Arrival]:
        for part in self.parts:
            self.events.append("arrival")
            yield part

    def answer(self, y: Tensor) -> None:
        self.events.append("answer")
        self.answers.append(y)

    def combine(self) -> Tensor:
        self.events.append("combine")
        return torch.cat(self.answers)


def test_dispatcher() -> None:
    """Parts are answered one by one, and what runs beside comes before the outputs are awaited."""
    route = partial(softmax_topk, k=K, renormalize=True)
    whole = FusedMoE(H, I, E, route)
    whole.reset_parameters()
    x = torch.randn(10, H)
    parts = []
    for rank in (0, 1):
        dispatcher = HalfOfTheExperts(rank)
        part = FusedMoE(H, I, E, route, dispatcher=dispatcher)
        part.shared = Beside(dispatcher.events)
        part.gate = whole.gate
        part.w13 = nn.Parameter(whole.w13[rank::2])
        part.w2 = nn.Parameter(whole.w2[rank::2])
        # The names of experts are turned around on the way in, and their slots back.
        part.physical_ids = lambda ids: E - 1 - ids
        part.route = lambda logits: (lambda w, ids: (w, E - 1 - ids))(*route(logits))
        parts.append(part(x))
        assert dispatcher.events == ["arrival", "answer"] * 2 + ["beside", "combine"]
    assert_close(parts[0] + parts[1], whole(x) + 2 * x)


class Beside(nn.Module):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def forward(self, x: Tensor) -> Tensor:
        self.events.append("beside")
        return x


def test_no_experts_of_its_own() -> None:
    moe = FusedMoE(H, I, 0, partial(softmax_topk, k=K, renormalize=True))
    x = torch.randn(3, H)
    y = moe.experts(x, torch.rand(3, K), torch.full((3, K), -1, dtype=torch.int32))
    assert torch.equal(y, torch.zeros(3, H))


@torch.no_grad()
def test_dispatcher_with_biases() -> None:
    """A rank adds the biases of its own experts."""
    whole, _ = gpt_oss()
    x = torch.randn(10, H)
    parts = []
    for rank in (0, 1):
        part = FusedMoE(
            *(H, I, E // 2),
            whole.route,
            activation=whole.activation,
            bias=True,
            dispatcher=HalfOfTheExperts(rank),
        )
        part.gate = whole.gate
        for name in ("w13", "w2", "bias13", "bias2"):
            setattr(part, name, nn.Parameter(getattr(whole, name)[rank::2]))
        parts.append(part(x))
    assert_close(parts[0] + parts[1], whole(x))


def test_trains() -> None:
    moe = FusedMoE(H, I, E, partial(softmax_topk, k=K, renormalize=False))
    moe.reset_parameters()
    x = torch.randn(50, H)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (moe(x) - x.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert moe.gate.grad is not None
    assert moe.gate.grad.abs().sum() > 0
    assert losses[-1] < 0.8 * losses[0]

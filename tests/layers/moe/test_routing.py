"""Routers: against transformers' own router modules, and the properties every router has."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Cohere2MoeConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeSparseMoeBlock
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2SparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import sparsemixer as phimoe_sparsemixer
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moezoo.layers.moe import (
    biased_topk,
    grouped_topk,
    softmax_topk,
    sparsemixer,
    topk_sigmoid,
)

V2 = partial(grouped_topk, num_groups=4, topk_groups=2, renormalize=False, scaling=16.0)
V3 = partial(grouped_topk, num_groups=4, topk_groups=2, scoring="sigmoid", scaling=2.5)
ROUTES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "plain": partial(softmax_topk, renormalize=False),
    "renormalized": partial(softmax_topk, renormalize=True),
    "groups": V2,
    "biased": partial(V3, correction_bias=torch.linspace(-0.1, 0.1, 12), renormalize=True),
    "biased-softmax": partial(
        biased_topk, correction_bias=torch.linspace(-0.1, 0.1, 12), scoring="softmax", min_sum=0.2
    ),
    "sparsemixer": partial(sparsemixer, jitter=0.2),
    "sigmoid-of-chosen": partial(topk_sigmoid, renormalize=True),
}


def config(cls: type[PreTrainedConfig], **settings: object) -> PreTrainedConfig:
    return cls(hidden_size=20, num_attention_heads=2, num_experts_per_tok=3, **settings)


def v3(**settings: object) -> PreTrainedConfig:
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    return config(DeepseekV3Config, n_routed_experts=12, **(groups | settings))


def v2(**settings: object) -> PreTrainedConfig:
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
    return config(DeepseekV2Config, n_routed_experts=12, **(groups | settings))


@pytest.mark.parametrize(
    ("block", "config", "route"),
    [
        pytest.param(
            MixtralSparseMoeBlock,
            config(MixtralConfig, num_local_experts=12),
            ROUTES["renormalized"],
            id="mixtral",
        ),
        pytest.param(
            Qwen2MoeSparseMoeBlock,
            config(Qwen2MoeConfig, num_experts=12, norm_topk_prob=False),
            ROUTES["plain"],
            id="qwen2_moe",
        ),
        pytest.param(
            Qwen3MoeSparseMoeBlock,
            config(Qwen3MoeConfig, num_experts=12, norm_topk_prob=True),
            ROUTES["renormalized"],
            id="qwen3_moe",
        ),
        pytest.param(
            OlmoeSparseMoeBlock,
            config(OlmoeConfig, num_experts=12, norm_topk_prob=False),
            ROUTES["plain"],
            id="olmoe",
        ),
        pytest.param(
            DeepseekV2Moe,
            v2(topk_method="greedy"),
            partial(V2, num_groups=1, topk_groups=1),
            id="deepseek_v2-greedy",
        ),
        pytest.param(
            DeepseekV2Moe,
            v2(topk_method="group_limited_greedy", norm_topk_prob=True),
            V2,
            id="deepseek_v2-group_limited_greedy",
        ),
        pytest.param(
            DeepseekV3MoE,
            v3(norm_topk_prob=True),
            partial(V3, renormalize=True),
            id="deepseek_v3",
        ),
        pytest.param(
            DeepseekV3MoE,
            v3(norm_topk_prob=False, n_group=1, topk_group=1),
            partial(V3, num_groups=1, topk_groups=1, renormalize=False),
            id="deepseek_v3-no-groups",
        ),
        pytest.param(
            MiniMaxM2SparseMoeBlock,
            config(MiniMaxM2Config, num_local_experts=12),
            partial(biased_topk, scoring="sigmoid"),
            id="minimax_m2",
        ),
        pytest.param(
            Ernie4_5_MoeSparseMoeBlock,
            config(Ernie4_5_MoeConfig, moe_num_experts=12, moe_norm_min=0.4, moe_k=3),
            partial(biased_topk, scoring="softmax", min_sum=0.4),
            id="ernie4_5_moe",
        ),
        *(
            pytest.param(
                Cohere2MoeSparseMoeBlock,
                config(
                    Cohere2MoeConfig,
                    num_experts=12,
                    norm_topk_prob=renormalize,
                    expert_selection_fn="sigmoid",
                ),
                partial(topk_sigmoid, renormalize=renormalize),
                id=f"cohere2_moe-{renormalize}",
            )
            for renormalize in (False, True)
        ),
    ],
)
def test_equals_transformers(
    block: type[torch.nn.Module],
    config: PreTrainedConfig,
    route: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    torch.manual_seed(0)
    moe = block(config)
    torch.nn.init.normal_(moe.gate.weight)
    for name, bias in moe.state_dict().items():
        if "e_score_correction_bias" in name:
            torch.nn.init.normal_(bias, std=0.3)
            route = partial(route, correction_bias=bias.flatten())
    x = torch.randn(200, config.hidden_size)
    with torch.no_grad():
        captured: list[Tensor] = []
        moe.experts.register_forward_pre_hook(lambda _, args: captured.extend(args[1:3]))
        moe(x.unsqueeze(0))
        expected_ids, expected_weights = captured
        weights, ids = route(x @ moe.gate.weight.T, 3)
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    assert torch.equal(ids.gather(-1, order), expected_ids.gather(-1, expected_order).int())
    torch.testing.assert_close(
        weights.gather(-1, order), expected_weights.gather(-1, expected_order)
    )


@pytest.mark.parametrize("jitter", [0.01, 0.3, 2.0])
def test_sparsemixer_equals_transformers(jitter: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 9, generator=generator)
    logits[:100] -= 5  # rows whose best logit is negative
    expected_weights, expected_ids = phimoe_sparsemixer(logits, jitter, training=False)
    weights, ids = sparsemixer(logits, 2, jitter=jitter)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids.int())
    torch.testing.assert_close(weights, expected_weights)
    assert len(weights.unique()) > 30


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shapes_and_dtypes(route: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    for num_tokens in (0, 1, 5):
        weights, ids = route(torch.randn(num_tokens, 12, dtype=dtype), 3)
        assert (weights.shape, weights.dtype) == ((num_tokens, 3), torch.float32)
        assert (ids.shape, ids.dtype) == ((num_tokens, 3), torch.int32)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@given(seed=st.integers(0, 2**32 - 1), bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_bad_row_touches_no_other(
    route: Callable[..., tuple[Tensor, Tensor]], seed: int, bad: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 12, generator=generator)
    spoilt = logits.clone()
    spoilt[3, torch.rand(12, generator=generator) < 0.5] = bad
    others = [0, 1, 2, 4, 5, 6]
    (weights, ids), (spoilt_weights, spoilt_ids) = route(logits, 3), route(spoilt, 3)
    assert torch.equal(weights[others], spoilt_weights[others])
    assert torch.equal(ids[others], spoilt_ids[others])
    assert ((spoilt_ids >= 0) & (spoilt_ids < 12)).all()
    assert all(len(set(row)) == 3 for row in spoilt_ids.tolist())


@pytest.mark.parametrize("num_experts", [4, 12, 256])
def test_ties_go_to_the_lower_id(num_experts: int) -> None:
    logits = torch.zeros(3, num_experts)
    first = torch.arange(4, dtype=torch.int32).expand(3, 4)
    for renormalize in (True, False):
        assert torch.equal(softmax_topk(logits, 4, renormalize=renormalize)[1], first)
    for bias in (None, torch.zeros(num_experts)):
        ids = V3(logits, 4, correction_bias=bias, renormalize=True, topk_groups=4)[1]
        assert torch.equal(ids, first)
        # Of equal groups the first two, and in them the first experts.
        ids = V3(logits, num_experts // 4, correction_bias=bias, renormalize=True)[1]
        assert torch.equal(ids[0], torch.arange(num_experts // 4, dtype=torch.int32))


def test_bias_steers_the_choice_but_not_the_weights() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    weights, ids = grouped_topk(
        logits,
        2,
        num_groups=1,
        topk_groups=1,
        scoring="sigmoid",
        correction_bias=bias,
        renormalize=False,
    )
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, 3.0]]).sigmoid())


def test_group_scores_are_the_maximum_without_bias_and_the_two_best_with_it() -> None:
    logits = torch.tensor([[2.0, -9.0, -9.0, 1.0, 1.0, 1.0]])
    one_of_two = partial(
        grouped_topk,
        k=2,
        num_groups=2,
        topk_groups=1,
        scoring="sigmoid",
        renormalize=False,
    )
    assert one_of_two(logits)[1].tolist() == [[0, 1]]
    assert one_of_two(logits, correction_bias=torch.zeros(6))[1].tolist() == [[3, 4]]


def test_experts_outside_the_chosen_groups_weigh_nothing_without_bias() -> None:
    weights, ids = grouped_topk(
        torch.tensor([[2.0, 1.0, 0.0, 0.0]]), 3, num_groups=4, topk_groups=1, renormalize=False
    )
    assert ids.tolist() == [[0, 1, 2]]
    assert weights[0, 1:].tolist() == [0.0, 0.0]


def test_weights_carry_the_gradient() -> None:
    for route in ROUTES.values():
        logits = torch.randn(4, 12, requires_grad=True)
        weights, _ = route(logits, 3)
        (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        assert logits.grad is not None
        assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be in 1..12, the number of experts, got 0"),
        ({"k": 13}, "k must be in 1..12, the number of experts, got 13"),
        ({"num_groups": 5}, "num_groups must divide the 12 experts"),
        ({"topk_groups": 5}, "got num_groups=4, topk_groups=5"),
        ({"scoring": "tanh"}, "scoring must be 'softmax' or 'sigmoid', got 'tanh'"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {
        "k": 3,
        "num_groups": 4,
        "topk_groups": 2,
        "renormalize": True,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_topk(torch.zeros(1, 12), **(settings | arguments))

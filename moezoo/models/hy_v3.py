"""Hy3 (Tencent, 2026): Qwen3's attention, sigmoid scores with a correction bias, renormalised."""

from functools import partial

from transformers import HYV3Config

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import attention_biases, grouped_queries, norm_of_each_head
from moezoo.models.common.feed_forward import (
    dense_by_list_and_count,
    dense_or_moe,
    ungrouped_sigmoid_route,
)
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import (
    ATTENTION,
    CORRECTION_BIAS,
    DECODER,
    DENSE_MLP,
    EXPERTS,
    QK_NORM,
    SHARED_EXPERTS,
    TOKEN_PREDICTION_LAYERS,
    gated_mlp,
)

ASSUMES = ASSUMED_EVERYWHERE | {
    # The released config sets it; the logits are the same.
    "output_router_logits": (False, True),
    "moe_router_use_sigmoid": (True,),
    "moe_router_enable_expert_bias": (True,),
    "qk_norm": (True,),
    "route_norm": (True,),
}


def build(config: HYV3Config) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            **norm_of_each_head(config),
        )

    feed_forward = dense_or_moe(
        config,
        partial(ungrouped_sigmoid_route, scaling=config.router_scaling_factor),
        dense=dense_by_list_and_count(config),
        num_shared=config.num_shared_experts,
        bias=config.mlp_bias,
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    *DENSE_MLP,
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.mlp.router.gate.weight"),
    *EXPERTS,
    Rule(CORRECTION_BIAS.target, "model.layers.{L}.mlp.expert_bias"),
    Rule(CORRECTION_BIAS.target, "model.layers.{L}.mlp.e_score_correction_bias"),
    *gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_mlp"),
    *SHARED_EXPERTS,
    TOKEN_PREDICTION_LAYERS,
)

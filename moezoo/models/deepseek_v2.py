"""DeepSeek-V2 (DeepSeek-AI, 2024): latent attention, shared experts, groups ranked by maximum."""

from functools import partial

from transformers import DeepseekV2Config

from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.moe.layer import Route
from moezoo.layers.moe.routing import grouped_topk
from moezoo.layers.rope import rotate_interleaved
from moezoo.models.common.feed_forward import check_groups, dense_by_count, dense_or_moe
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.common.latent_attention import LATENT_SIZES, latent_attention
from moezoo.models.common.names import DECODER, DENSE_MLP, EXPERTS, MLA, SHARED_EXPERTS

ASSUMES = ASSUMED_EVERYWHERE | {
    **LATENT_SIZES,
    "topk_method": ("greedy", "group_limited_greedy"),
    "scoring_func": ("softmax",),
    "moe_layer_freq": (1, None),
}


def route(config: DeepseekV2Config) -> Route:
    """Return a router of softmax scores, limited to groups where `config.topk_method` says so."""
    groups = {}
    if config.topk_method == "group_limited_greedy":
        check_groups(config)
        groups = {"num_groups": config.n_group, "topk_groups": config.topk_group}
    return partial(
        grouped_topk,
        k=experts_per_token(config, config.n_routed_experts),
        scoring="softmax",
        renormalize=False,
        scaling=config.routed_scaling_factor,
        **groups,
    )


def build(config: DeepseekV2Config) -> Decoder:
    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        return latent_attention(config, rotate_interleaved)

    feed_forward = dense_or_moe(
        config,
        route,
        dense=dense_by_count(config),
        num_shared=config.n_shared_experts,
        bias=config.mlp_bias,
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (
    *DECODER,
    *MLA,
    *DENSE_MLP,
    *EXPERTS,
    *SHARED_EXPERTS,
)

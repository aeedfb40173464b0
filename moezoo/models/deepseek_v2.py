"""DeepSeek-V2 (DeepSeek-AI, 2024): latent attention, shared experts, groups chosen by maximum."""

from collections.abc import Callable
from functools import partial

from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig, PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.linear import Linear
from moezoo.layers.mla import LowRankLinear, MultiHeadLatentAttention, yarn_softmax_factor
from moezoo.layers.moe.routing import grouped_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import Rotate, rotate_interleaved
from moezoo.models.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.mixtures import check_groups, dense_or_mixture, first_layers
from moezoo.models.names import DECODER, DENSE_MLP, EXPERTS, MLA, SHARED_EXPERTS

ASSUMES = ASSUMED_EVERYWHERE | {
    "topk_method": ("greedy", "group_limited_greedy"),
    "scoring_func": ("softmax",),
    "moe_layer_freq": (1, None),
}

LATENT_NORM_EPS = 1e-6


def latent_attention(
    config: DeepseekV2Config | DeepseekV3Config | Glm4MoeLiteConfig,
    rotate: Rotate,
    *,
    layer: Callable[..., MultiHeadLatentAttention] = MultiHeadLatentAttention,
) -> MultiHeadLatentAttention:
    """A `layer` of the sizes that a config names, its softmax scaled as the rotation wants it."""
    if config.head_dim != config.qk_rope_head_dim:
        raise UnsupportedArchitectureError.of_field(
            config, "head_dim", f"qk_rope_head_dim, {config.qk_rope_head_dim}"
        )
    try:
        factor = yarn_softmax_factor(config.rope_parameters)
    except TypeError as error:
        raise UnsupportedArchitectureError.of_field(
            config, "rope_parameters", f"numbers ({error})"
        ) from error
    attention = latent_attention_of_sizes(config, rotate, layer=layer)
    attention.scale *= factor
    return attention


def latent_attention_of_sizes(
    config: PreTrainedConfig,
    rotate: Rotate,
    *,
    layer: Callable[..., MultiHeadLatentAttention] = MultiHeadLatentAttention,
) -> MultiHeadLatentAttention:
    """The same where a config says nothing of a rotation."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedArchitectureError.of_field(
            config, "num_key_value_heads", f"num_attention_heads, {config.num_attention_heads}"
        )
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    width = config.num_attention_heads * head_dim
    q: nn.Module
    if config.q_lora_rank is None:
        q = Linear(config.hidden_size, width, bias=False)
    else:
        q = LowRankLinear(
            config.hidden_size,
            config.q_lora_rank,
            width,
            norm=RMSNorm(config.q_lora_rank, LATENT_NORM_EPS),
            bias=config.attention_bias,
        )
    return layer(
        config.hidden_size,
        config.num_attention_heads,
        q,
        kv_norm=RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS),
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        rotate=rotate,
        scale=head_dim**-0.5,
        bias=config.attention_bias,
    )


def build(config: DeepseekV2Config) -> Decoder:
    grouped = config.topk_method == "group_limited_greedy"
    if grouped:
        check_groups(config)
    route = partial(
        grouped_topk,
        k=experts_per_token(config, config.n_routed_experts),
        num_groups=config.n_group if grouped else 1,
        topk_groups=config.topk_group if grouped else 1,
        scoring="softmax",
        renormalize=False,
        scaling=config.routed_scaling_factor,
    )

    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        return latent_attention(config, rotate_interleaved)

    feed_forward = dense_or_mixture(
        config,
        lambda: route,
        dense=first_layers(config),
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

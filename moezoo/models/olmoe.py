"""OLMoE (Allen AI, 2024): queries and keys normalised over all heads, optionally clipped."""

from functools import partial

from transformers import FlexOlmoConfig, OlmoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.models.common.attention import attention_biases, grouped_queries, norm_of_all_heads
from moezoo.models.common.feed_forward import moe_layer, softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, DECODER, EXPERTS, QK_NORM

ASSUMES = ASSUMED_EVERYWHERE


def feed_forward(config: OlmoeConfig | FlexOlmoConfig, layer_idx: int) -> FusedMoE:
    route = softmax_route(config, renormalize=config.norm_topk_prob)
    return moe_layer(config, config.intermediate_size, route)


def build(config: OlmoeConfig) -> Decoder:
    head_dim = config.hidden_size // config.num_attention_heads
    if (getattr(config, "head_dim", None) or head_dim) != head_dim:
        raise UnsupportedArchitectureError.of_field(config, "head_dim", str(head_dim))

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            clip=config.clip_qkv,
            **norm_of_all_heads(config),
        )

    return pre_norm_decoder(config, attention, partial(feed_forward, config))


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *EXPERTS)

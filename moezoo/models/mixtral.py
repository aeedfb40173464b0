"""Mixtral (Mistral AI, 2024): MoE layers throughout, weights of the chosen experts renormalised."""

from transformers import MixtralConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.models.common.attention import grouped_queries
from moezoo.models.common.feed_forward import moe_layer, softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, BLOCK_SPARSE_MOE, DECODER, EXPERTS

ASSUMES = ASSUMED_EVERYWHERE


def build(config: MixtralConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(config, window=config.sliding_window)

    def feed_forward(layer_idx: int) -> FusedMoE:
        return moe_layer(config, config.intermediate_size, softmax_route(config, renormalize=True))

    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *BLOCK_SPARSE_MOE,
    *EXPERTS,
)

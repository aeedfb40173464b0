"""MiniMax-M2 (MiniMax, 2025): part of each head is rotated, sigmoid scores, correction bias."""

from functools import partial

from transformers import MiniMaxM2Config

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import BiasedRoute, FusedMoE
from moezoo.layers.moe.routing import biased_topk
from moezoo.layers.rope import RotaryEmbedding
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import grouped_queries, norm_of_all_heads, with_rope
from moezoo.models.common.feed_forward import moe_layer
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.common.names import (
    ATTENTION,
    BLOCK_SPARSE_MOE,
    CORRECTION_BIAS,
    DECODER,
    EXPERTS,
    QK_NORM,
)

ASSUMES = ASSUMED_EVERYWHERE | {
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_layer",),
    "shared_intermediate_size": (0,),
}


def rotary_embedding(config: MiniMaxM2Config) -> RotaryEmbedding:
    """Return the rotation of the first `rotary_dim` numbers of each head.

    The releases have that field, which not every version of transformers reads.
    """
    rotary_dim = getattr(config, "rotary_dim", None)
    if rotary_dim is not None:
        share = {"partial_rotary_factor": rotary_dim / config.head_dim}
        config = with_rope(config, share | config.rope_parameters)
    return RotaryEmbedding(config)


def build(config: MiniMaxM2Config) -> Decoder:
    if set(getattr(config, "attn_type_list", ())) - {1}:
        raise UnsupportedArchitectureError.of_field(
            config, "attn_type_list", "1, softmax attention, for every layer"
        )

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(config, **norm_of_all_heads(config))

    k = experts_per_token(config, config.num_local_experts)
    route = partial(biased_topk, k=k, scoring="sigmoid")

    def feed_forward(layer_idx: int) -> FusedMoE:
        biased = BiasedRoute(config.num_local_experts, route)
        return moe_layer(config, config.intermediate_size, biased)

    return pre_norm_decoder(config, attention, feed_forward, rope=rotary_embedding(config))


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    *BLOCK_SPARSE_MOE,
    *EXPERTS,
    Rule(CORRECTION_BIAS.target, "model.layers.{L}.block_sparse_moe.e_score_correction_bias"),
    Rule(CORRECTION_BIAS.target, "model.layers.{L}.mlp.e_score_correction_bias"),
)

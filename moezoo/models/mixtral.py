"""Mixtral (Mistral AI, 2024): every layer a mixture, weights of the chosen experts renormalised."""

from functools import partial

from transformers import MixtralConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import grouped_queries
from moezoo.models.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.names import ATTENTION, DECODER, EXPERTS

ASSUMES = ASSUMED_EVERYWHERE


def build(config: MixtralConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(config, window=config.sliding_window)

    def feed_forward(layer_idx: int) -> FusedMoE:
        return FusedMoE(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            partial(
                softmax_topk,
                k=experts_per_token(config, config.num_local_experts),
                renormalize=True,
            ),
            activation=config.hidden_act,
        )

    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.block_sparse_moe.gate.weight"),
    Rule(
        "layers.{L}.mlp.w13",
        "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight",
        "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight",
        shard="expert",
    ),
    Rule(
        "layers.{L}.mlp.w2",
        "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight",
        shard="expert",
    ),
    *EXPERTS,
)

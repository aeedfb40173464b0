"""LFM2-MoE (Liquid AI, 2025): short convolutions, and attention in some layers."""

import copy
from functools import partial

from torch import nn
from transformers import Lfm2MoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.moe import BiasedRoute, FusedMoE
from moezoo.layers.moe.layer import Route
from moezoo.layers.moe.routing import grouped_topk
from moezoo.layers.short_convolution import ShortConvolution
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.common.attention import grouped_queries, norm_of_each_head
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, AtLeast, experts_per_token

ASSUMES = ASSUMED_EVERYWHERE | {
    "hidden_act": ("silu",),
    "conv_bias": (False,),  # in transformers the convolution would see the bias of padding
    "conv_L_cache": AtLeast(1),
    "num_dense_layers": AtLeast(0),
}


def build(config: Lfm2MoeConfig) -> Decoder:
    if config.layer_types is None:
        raise UnsupportedArchitectureError.of_field(config, "layer_types", "a kind for each layer")
    config = copy.copy(config)
    config.rms_norm_eps = config.norm_eps
    route: Route = partial(
        grouped_topk,
        k=experts_per_token(config, config.num_experts),
        scoring="sigmoid",
        renormalize=config.norm_topk_prob,
        epsilon=1e-6,
        scaling=config.routed_scaling_factor,
    )

    def attention(layer_idx: int) -> SequenceMixer:
        if config.layer_types[layer_idx] == "conv":
            return ShortConvolution(config.hidden_size, config.conv_L_cache)
        return grouped_queries(config, **norm_of_each_head(config))

    def feed_forward(layer_idx: int) -> nn.Module:
        if layer_idx < config.num_dense_layers:
            return GatedMLP(config.hidden_size, config.intermediate_size, activation="silu")
        return FusedMoE(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            BiasedRoute(config.num_experts, route) if config.use_expert_bias else route,
            activation="silu",
        )

    return pre_norm_decoder(config, attention, feed_forward)


LAYER = "model.layers.{L}"
MLP = f"{LAYER}.feed_forward"

CHECKPOINT = (
    Rule("embed.weight", "model.embed_tokens.weight"),
    Rule("norm.weight", "model.embedding_norm.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
    Skip("model.pos_emb.inv_freq", "computed from the config"),
    Rule(
        "layers.{L}.attn.qkv.weight",
        *(f"{LAYER}.self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
    ),
    *(
        Rule(f"layers.{{L}}.{ours}", f"{LAYER}.{theirs}")
        for ours, theirs in (
            ("attn_norm.weight", "operator_norm.weight"),
            ("mlp_norm.weight", "ffn_norm.weight"),
            ("attn.o.weight", "self_attn.out_proj.weight"),
            ("attn.q_norm.weight", "self_attn.q_layernorm.weight"),
            ("attn.k_norm.weight", "self_attn.k_layernorm.weight"),
            ("attn.bcx.weight", "conv.in_proj.weight"),
            ("attn.conv.weight", "conv.conv.weight"),
            ("attn.out.weight", "conv.out_proj.weight"),
            ("mlp.down.weight", "feed_forward.w2.weight"),
            ("mlp.gate", "feed_forward.gate.weight"),
            ("mlp.route.correction_bias", "feed_forward.expert_bias"),
        )
    ),
    Rule("layers.{L}.mlp.gate_up.weight", f"{MLP}.w1.weight", f"{MLP}.w3.weight"),
    Rule(
        "layers.{L}.mlp.w13",
        f"{MLP}.experts.{{E}}.w1.weight",
        f"{MLP}.experts.{{E}}.w3.weight",
        shard="expert",
    ),
    Rule("layers.{L}.mlp.w13", f"{MLP}.experts.gate_up_proj", shard="expert"),
    Rule("layers.{L}.mlp.w2", f"{MLP}.experts.{{E}}.w2.weight", shard="expert"),
    Rule("layers.{L}.mlp.w2", f"{MLP}.experts.down_proj", shard="expert"),
)

"""Qwen2-MoE and Qwen1.5-MoE (Alibaba, 2024): a shared expert with a sigmoid gate of its own."""

from functools import partial

from torch import nn
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, DecoderLayer
from moezoo.layers.mlp import GatedMLP, SigmoidGatedMLP
from moezoo.layers.moe import ACTIVATIONS, FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding
from moezoo.loaders.mapping import Rule
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, gated_mlp

ASSUMES = {"hidden_act": tuple(ACTIVATIONS)}


def feed_forward(
    config: Qwen2MoeConfig | Qwen3MoeConfig, layer_idx: int, shared: nn.Module | None
) -> nn.Module:
    """Every `decoder_sparse_step`-th layer is a mixture, but for `mlp_only_layers`."""
    if layer_idx in config.mlp_only_layers or (layer_idx + 1) % config.decoder_sparse_step:
        return GatedMLP(config.hidden_size, config.intermediate_size, activation=config.hidden_act)
    return FusedMoE(
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        partial(softmax_topk, k=config.num_experts_per_tok, renormalize=config.norm_topk_prob),
        activation=config.hidden_act,
        shared=shared,
    )


def build(config: Qwen2MoeConfig) -> Decoder:
    def layer(layer_idx: int) -> DecoderLayer:
        slides = config.layer_types[layer_idx] == "sliding_attention"
        return DecoderLayer(
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            GroupedQueryAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                head_dim=config.hidden_size // config.num_attention_heads,
                qkv_bias=config.qkv_bias,
                window=config.sliding_window if slides else None,
            ),
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            feed_forward(
                config,
                layer_idx,
                SigmoidGatedMLP(
                    config.hidden_size,
                    config.shared_expert_intermediate_size,
                    activation=config.hidden_act,
                ),
            ),
        )

    return Decoder(
        config.vocab_size,
        config.hidden_size,
        [layer(layer_idx) for layer_idx in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        rope=RotaryEmbedding(config),
        tied=config.tie_word_embeddings,
    )


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *DENSE_MLP,
    *EXPERTS,
    *gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_expert"),
    Rule("layers.{L}.mlp.shared.gate.weight", "model.layers.{L}.mlp.shared_expert_gate.weight"),
)

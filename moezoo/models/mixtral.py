"""Mixtral (Mistral AI, 2024): every layer a mixture, weights of the chosen experts renormalised."""

from functools import partial

from transformers import MixtralConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, DecoderLayer
from moezoo.layers.moe import ACTIVATIONS, FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding
from moezoo.loaders.mapping import Rule
from moezoo.models.names import ATTENTION, DECODER, EXPERTS

ASSUMES = {"hidden_act": tuple(ACTIVATIONS)}


def build(config: MixtralConfig) -> Decoder:
    def layer() -> DecoderLayer:
        return DecoderLayer(
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            GroupedQueryAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
                window=config.sliding_window,
            ),
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            FusedMoE(
                config.hidden_size,
                config.intermediate_size,
                config.num_local_experts,
                partial(softmax_topk, k=config.num_experts_per_tok, renormalize=True),
                activation=config.hidden_act,
            ),
        )

    return Decoder(
        config.vocab_size,
        config.hidden_size,
        [layer() for _ in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        rope=RotaryEmbedding(config),
        tied=config.tie_word_embeddings,
    )


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

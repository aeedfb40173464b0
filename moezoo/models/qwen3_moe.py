"""Qwen3-MoE (Alibaba, 2025): queries and keys normalised head by head, no shared expert."""

from transformers import Qwen3MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, DecoderLayer
from moezoo.layers.moe import ACTIVATIONS
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, QK_NORM
from moezoo.models.qwen2_moe import feed_forward

ASSUMES = {"hidden_act": tuple(ACTIVATIONS)}


def build(config: Qwen3MoeConfig) -> Decoder:
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)

    def layer(layer_idx: int) -> DecoderLayer:
        return DecoderLayer(
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            GroupedQueryAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                head_dim=head_dim,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                q_norm=RMSNorm(head_dim, config.rms_norm_eps),
                k_norm=RMSNorm(head_dim, config.rms_norm_eps),
                window=config.sliding_window,
            ),
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            feed_forward(config, layer_idx, shared=None),
        )

    return Decoder(
        config.vocab_size,
        config.hidden_size,
        [layer(layer_idx) for layer_idx in range(config.num_hidden_layers)],
        norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        rope=RotaryEmbedding(config),
        tied=config.tie_word_embeddings,
    )


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *DENSE_MLP, *EXPERTS)

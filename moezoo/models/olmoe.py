"""OLMoE (Allen AI, 2024): queries and keys normalised over all heads, optionally clipped."""

from functools import partial

from transformers import OlmoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, DecoderLayer
from moezoo.layers.moe import ACTIVATIONS, FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import RotaryEmbedding
from moezoo.models.names import ATTENTION, DECODER, EXPERTS, QK_NORM

ASSUMES = {"hidden_act": tuple(ACTIVATIONS)}


def build(config: OlmoeConfig) -> Decoder:
    head_dim = config.hidden_size // config.num_attention_heads

    def layer() -> DecoderLayer:
        return DecoderLayer(
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            GroupedQueryAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                head_dim=head_dim,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                q_norm=RMSNorm(config.num_attention_heads * head_dim, config.rms_norm_eps),
                k_norm=RMSNorm(config.num_key_value_heads * head_dim, config.rms_norm_eps),
                clip=config.clip_qkv,
            ),
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            FusedMoE(
                config.hidden_size,
                config.intermediate_size,
                config.num_experts,
                partial(
                    softmax_topk, k=config.num_experts_per_tok, renormalize=config.norm_topk_prob
                ),
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


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *EXPERTS)

"""Qwen3-MoE (Alibaba, 2025): queries and keys normalised head by head, no shared expert."""

from functools import partial

from transformers import Qwen3MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.norm import RMSNorm
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, QK_NORM
from moezoo.models.qwen2_moe import feed_forward

ASSUMES = ASSUMED_EVERYWHERE


def build(config: Qwen3MoeConfig) -> Decoder:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return GroupedQueryAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim=head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            q_norm=RMSNorm(head_dim, config.rms_norm_eps),
            k_norm=RMSNorm(head_dim, config.rms_norm_eps),
            window=config.sliding_window,
        )

    return pre_norm_decoder(config, attention, partial(feed_forward, config, lambda: None))


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *DENSE_MLP, *EXPERTS)

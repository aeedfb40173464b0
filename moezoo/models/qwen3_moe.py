"""Qwen3-MoE (Alibaba, 2025): queries and keys normalised head by head, no shared expert."""

from functools import partial

from transformers import Qwen3MoeConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.models.attentions import attention_biases, grouped_queries, norm_of_each_head
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, QK_NORM
from moezoo.models.qwen2_moe import feed_forward

ASSUMES = ASSUMED_EVERYWHERE


def build(config: Qwen3MoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            window=config.sliding_window,
            **norm_of_each_head(config),
        )

    return pre_norm_decoder(config, attention, partial(feed_forward, config, lambda: None))


CHECKPOINT = (*DECODER, *ATTENTION, *QK_NORM, *DENSE_MLP, *EXPERTS)

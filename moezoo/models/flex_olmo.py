"""FlexOlmo (Allen AI, 2025): OLMoE whose norms follow attention and experts."""

from functools import partial

import torch
from transformers import FlexOlmoConfig

from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.decoder import Decoder, DecoderLayer, pre_norm_decoder
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import attention_biases, grouped_queries, norm_of_all_heads
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import AROUND_LAYERS, ATTENTION, EXPERTS, QK_NORM
from moezoo.models.olmoe import feed_forward

ASSUMES = ASSUMED_EVERYWHERE


class PostNormLayer(DecoderLayer):
    """x + norm(attn(x)), then x + norm(mlp(x))."""

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, context: Context, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x if update is None else x + update
        x = x + self.attn_norm(self.attn(x, context, layer_idx))
        return x, self.mlp_norm(self.mlp(x))


def build(config: FlexOlmoConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            **norm_of_all_heads(config),
        )

    return pre_norm_decoder(config, attention, partial(feed_forward, config), layer=PostNormLayer)


CHECKPOINT = (
    *AROUND_LAYERS,
    *ATTENTION,
    *QK_NORM,
    Rule("layers.{L}.attn_norm.weight", "model.layers.{L}.post_attention_layernorm.weight"),
    Rule("layers.{L}.mlp_norm.weight", "model.layers.{L}.post_feedforward_layernorm.weight"),
    *EXPERTS,
)

"""GLM-4.7-Flash (Z.ai, 2026): DeepSeek-V3 whose config lists the dense layers."""

from transformers import Glm4MoeLiteConfig

from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.rope import rotate_half, rotate_interleaved
from moezoo.models import deepseek_v3
from moezoo.models.deepseek_v2 import latent_attention
from moezoo.models.mixtures import counted_layers, dense_or_mixture, sigmoid_route

ASSUMES = deepseek_v3.ASSUMES


def build(config: Glm4MoeLiteConfig) -> Decoder:
    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        rotate = rotate_interleaved if config.rope_interleave else rotate_half
        return latent_attention(config, rotate)

    feed_forward = dense_or_mixture(
        config,
        sigmoid_route(config),
        dense=counted_layers(config),
        num_shared=config.n_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = deepseek_v3.CHECKPOINT

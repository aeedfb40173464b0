"""DeepSeek-V3 (DeepSeek-AI, 2024) and Kimi K2: sigmoid scores with a correction bias."""

from collections.abc import Container

from transformers import DeepseekV3Config, Glm4MoeLiteConfig

from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.rope import rotate_half, rotate_interleaved
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.common.feed_forward import dense_by_count, dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.latent_attention import LATENT_SIZES, latent_attention
from moezoo.models.common.names import DECODER, DEEPSEEK_MOE, MLA, TOKEN_PREDICTION_LAYERS

ASSUMES = ASSUMED_EVERYWHERE | {
    **LATENT_SIZES,
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "moe_layer_freq": (1, None),
}


def decoder_of(config: DeepseekV3Config | Glm4MoeLiteConfig, dense: Container[int]) -> Decoder:
    """Return the decoder whose layers in `dense` are dense."""

    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        rotate = rotate_interleaved if config.rope_interleave else rotate_half
        return latent_attention(config, rotate)

    feed_forward = dense_or_moe(
        config, sigmoid_route, dense=dense, num_shared=config.n_shared_experts
    )
    return pre_norm_decoder(config, attention, feed_forward)


def build(config: DeepseekV3Config) -> Decoder:
    return decoder_of(config, dense_by_count(config))


CHECKPOINT: tuple[Rule | Skip, ...] = (*DECODER, *MLA, *DEEPSEEK_MOE, TOKEN_PREDICTION_LAYERS)

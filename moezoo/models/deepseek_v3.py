"""DeepSeek-V3 (DeepSeek-AI, 2024) and Kimi K2: sigmoid scores, a bias that steers the choice."""

from collections.abc import Container

from transformers import DeepseekV3Config, Glm4MoeLiteConfig

from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.rope import rotate_half, rotate_interleaved
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.deepseek_v2 import latent_attention
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.mixtures import dense_or_mixture, first_layers, sigmoid_route
from moezoo.models.names import BIASED_MIXTURES, DECODER, MLA, TOKEN_PREDICTION_LAYERS

ASSUMES = ASSUMED_EVERYWHERE | {
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "moe_layer_freq": (1, None),
}


def decoder_of(config: DeepseekV3Config | Glm4MoeLiteConfig, dense: Container[int]) -> Decoder:
    """With these layers dense."""

    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        rotate = rotate_interleaved if config.rope_interleave else rotate_half
        return latent_attention(config, rotate)

    feed_forward = dense_or_mixture(
        config, sigmoid_route(config), dense=dense, num_shared=config.n_shared_experts
    )
    return pre_norm_decoder(config, attention, feed_forward)


def build(config: DeepseekV3Config) -> Decoder:
    return decoder_of(config, first_layers(config))


CHECKPOINT: tuple[Rule | Skip, ...] = (*DECODER, *MLA, *BIASED_MIXTURES, TOKEN_PREDICTION_LAYERS)

"""K-EXAONE (LG AI Research, 2025): rotary embeddings in the sliding-window layers only."""

from transformers import ExaoneMoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.rope import rotate_half, unrotated
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import grouped_queries, norm_of_each_head, window_of
from moezoo.models.common.feed_forward import dense_by_list, dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import (
    ATTENTION,
    CORRECTION_BIAS,
    DECODER,
    DEEPSEEK_MOE,
    QK_NORM,
    TOKEN_PREDICTION,
)

ASSUMES = ASSUMED_EVERYWHERE | {"scoring_func": ("sigmoid",), "attention_bias": (False, None)}


def build(config: ExaoneMoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        window = window_of(config, layer_idx)
        return grouped_queries(
            config,
            window=window,
            rotate=unrotated if window is None else rotate_half,
            **norm_of_each_head(config),
        )

    dense = dense_by_list(config)
    sparse = [layer_idx not in dense for layer_idx in range(config.num_hidden_layers)]
    if getattr(config, "is_moe_layer", sparse) != sparse:
        raise UnsupportedArchitectureError.of_field(config, "is_moe_layer", str(sparse))
    feed_forward = dense_or_moe(
        config,
        sigmoid_route,
        dense=dense,
        num_shared=config.num_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward)


CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    Rule(CORRECTION_BIAS.target, "model.layers.{L}.mlp.e_score_correction_bias"),
    *DEEPSEEK_MOE,
    *TOKEN_PREDICTION,
)

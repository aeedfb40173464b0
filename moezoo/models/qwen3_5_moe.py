"""The text model of Qwen3.5-MoE (Alibaba, 2026): Qwen3-Next with separate projections."""

from functools import partial

from transformers import Qwen3_5MoeTextConfig

from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.gated_delta_net import by_kind
from moezoo.layers.moe import FusedMoE
from moezoo.layers.norm import ZeroCenteredRMSNorm
from moezoo.layers.rope import RotaryEmbedding
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, text_part
from moezoo.models.common.names import (
    ATTENTION,
    DECODER,
    EXPERTS,
    QK_NORM,
    TOKEN_PREDICTION,
    of_text_model,
)
from moezoo.models.qwen2_moe import SHARED_EXPERT, SHARED_SIZES, moe_with_shared_expert
from moezoo.models.qwen3_next import DELTA_NET, DELTA_SIZES, NET, hybrid_attention

ASSUMES = ASSUMED_EVERYWHERE | SHARED_SIZES | DELTA_SIZES

text_config = text_part


def build(config: Qwen3_5MoeTextConfig) -> Decoder:
    def feed_forward(layer_idx: int) -> FusedMoE:
        return moe_with_shared_expert(config, renormalize=True)

    # Text has the same position on all three axes, so the rotation is the usual one.
    return pre_norm_decoder(
        config,
        partial(hybrid_attention, config, by_kind),
        feed_forward,
        rope=RotaryEmbedding(config),
        norm=ZeroCenteredRMSNorm,
    )


TEXT: tuple[Rule | Skip, ...] = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    Rule("layers.{L}.attn.qkvz.weight", f"{NET}.in_proj_qkv.weight", f"{NET}.in_proj_z.weight"),
    Rule("layers.{L}.attn.ba.weight", f"{NET}.in_proj_b.weight", f"{NET}.in_proj_a.weight"),
    *DELTA_NET,
    *EXPERTS,
    *SHARED_EXPERT,
    *TOKEN_PREDICTION,
)

CHECKPOINT = (*TEXT, *of_text_model(TEXT))
"""Names of the text model alone, as transformers and moezoo save it, and inside the whole model."""

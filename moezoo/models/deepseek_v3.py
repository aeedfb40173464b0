"""DeepSeek-V3 (DeepSeek-AI, 2024) and Kimi K2: sigmoid scores, a bias that steers the choice."""

from functools import partial

from transformers import DeepseekV3Config

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.moe import BiasedRoute
from moezoo.layers.moe.routing import grouped_topk
from moezoo.layers.rope import rotate_half, rotate_interleaved
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.deepseek_v2 import check_routing, feed_forward, latent_attention
from moezoo.models.fields import ASSUMED_EVERYWHERE
from moezoo.models.names import DECODER, DENSE_MLP, EXPERTS, MLA, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE | {
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "moe_layer_freq": (1, None),
}


def build(config: DeepseekV3Config) -> Decoder:
    check_routing(config, grouped=True)
    if config.n_routed_experts // config.n_group < 2:
        raise UnsupportedArchitectureError.of_field(
            config, "n_group", "two experts a group or more"
        )
    rotate = rotate_interleaved if config.rope_interleave else rotate_half
    route = partial(
        grouped_topk,
        k=config.num_experts_per_tok,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        scoring="sigmoid",
        renormalize=config.norm_topk_prob,
        scaling=config.routed_scaling_factor,
    )

    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        return latent_attention(config, rotate)

    mlp = partial(GatedMLP, config.hidden_size, activation=config.hidden_act)
    biased = partial(BiasedRoute, config.n_routed_experts, route)
    return pre_norm_decoder(config, attention, partial(feed_forward, config, mlp, biased))


CHECKPOINT = (
    *DECODER,
    *MLA,
    *DENSE_MLP,
    *EXPERTS,
    Rule(
        "layers.{L}.mlp.route.correction_bias",
        "model.layers.{L}.mlp.gate.e_score_correction_bias",
    ),
    *gated_mlp("layers.{L}.mlp.shared", "model.layers.{L}.mlp.shared_experts"),
    Skip(
        "model.layers.{L}.{*}",
        "multi-token prediction",
        marks=tuple(f"model.layers.{{L}}.{name}.weight" for name in ("eh_proj", "enorm", "hnorm")),
    ),
)

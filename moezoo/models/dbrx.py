"""DBRX (Databricks, 2024): clipped attention, LayerNorm, matrices of experts in one tensor."""

from functools import partial

from transformers import DbrxConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import ACTIVATIONS, FusedMoE
from moezoo.layers.moe.routing import softmax_topk
from moezoo.layers.norm import LayerNorm
from moezoo.layers.rope import RotaryEmbedding, rope_of_whole_heads
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.attentions import grouped_queries, with_rope
from moezoo.models.fields import ASSUMED_EVERYWHERE

ASSUMES = ASSUMED_EVERYWHERE

UNNAMED = {"rope_type": "default", "rope_theta": 10_000.0}
"""transformers' rotation of a config that does not name one."""


def rotary_embedding(config: DbrxConfig) -> RotaryEmbedding:
    """The releases have `rope_theta` in their `attn_config`, where transformers does not read it.

    Raises `UnsupportedArchitectureError` where `rope_parameters` have another.
    """
    theta = getattr(config.attn_config, "rope_theta", None)
    if theta is not None and config.rope_parameters == UNNAMED:
        config = with_rope(config, UNNAMED | {"rope_theta": theta})
    elif theta not in (None, config.rope_parameters.get("rope_theta")):
        raise UnsupportedArchitectureError.of_field(
            config, "rope_parameters", f"the rope_theta of attn_config, {theta}"
        )
    return rope_of_whole_heads(config)


def build(config: DbrxConfig) -> Decoder:
    ffn = config.ffn_config
    activation = ffn.ffn_act_fn.get("name", "silu")
    for field, supported, fits in (
        ("ffn_act_fn", f"a name of {', '.join(ACTIVATIONS)}", activation in ACTIVATIONS),
        (
            "moe_normalize_expert_weights",
            "1 or None",
            ffn.moe_normalize_expert_weights in (1, None),
        ),
        ("moe_top_k", f"1 to {ffn.moe_num_experts}", 1 <= ffn.moe_top_k <= ffn.moe_num_experts),
        ("ffn_hidden_size", "1 or more", ffn.ffn_hidden_size > 0),
    ):
        if not fits:
            raise UnsupportedArchitectureError.of_field(ffn, field, supported)

    if config.hidden_size % config.num_attention_heads:
        raise UnsupportedArchitectureError.of_field(
            config, "num_attention_heads", f"a divisor of {config.hidden_size}"
        )

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(config, clip=config.attn_config.clip_qkv)

    def feed_forward(layer_idx: int) -> FusedMoE:
        return FusedMoE(
            config.hidden_size,
            ffn.ffn_hidden_size,
            ffn.moe_num_experts,
            partial(
                softmax_topk,
                k=ffn.moe_top_k,
                renormalize=ffn.moe_normalize_expert_weights is not None,
            ),
            activation=activation,
        )

    return pre_norm_decoder(
        config,
        attention,
        feed_forward,
        rope=rotary_embedding(config),
        norm=lambda dim, _: LayerNorm(dim, 1e-5, bias=False),
    )


BLOCK = "transformer.blocks.{L}"
ATTENTION = f"{BLOCK}.norm_attn_norm"
EXPERTS = f"{BLOCK}.ffn.experts.mlp"

CHECKPOINT = (
    Rule("embed.weight", "transformer.wte.weight"),
    Rule("norm.weight", "transformer.norm_f.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
    Rule("layers.{L}.attn_norm.weight", f"{ATTENTION}.norm_1.weight"),
    Rule("layers.{L}.mlp_norm.weight", f"{ATTENTION}.norm_2.weight"),
    Rule("layers.{L}.attn.qkv.weight", f"{ATTENTION}.attn.Wqkv.weight"),
    Rule("layers.{L}.attn.o.weight", f"{ATTENTION}.attn.out_proj.weight"),
    Skip(f"{ATTENTION}.attn.rotary_emb.inv_freq", "computed from the config"),
    Rule("layers.{L}.mlp.gate", f"{BLOCK}.ffn.router.layer.weight"),
    Rule("layers.{L}.mlp.w13", f"{EXPERTS}.w1", f"{EXPERTS}.v1", shard="expert", view="unflatten"),
    Rule("layers.{L}.mlp.w2", f"{EXPERTS}.w2", shard="expert", view=("unflatten", "transpose")),
    # For formats that have matrices only.
    Rule(
        "layers.{L}.mlp.w13",
        f"{EXPERTS}.{{E}}.w1.weight",
        f"{EXPERTS}.{{E}}.v1.weight",
        shard="expert",
    ),
    Rule("layers.{L}.mlp.w2", f"{EXPERTS}.{{E}}.w2.weight", shard="expert"),
)

"""gpt-oss (OpenAI, 2025): a sink for each head, a window in every other layer, experts with biases.

The releases store their experts in MXFP4. Gate and up rows alternate in them. So they do in 16-bit
checkpoints, whose matrices are transposed as well.
"""

import torch
from torch import nn
from transformers import GptOssConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import BiasedLogits, FusedMoE, Gating
from moezoo.loaders.mapping import Rule
from moezoo.models.common.attention import attention_biases, grouped_queries, window_of
from moezoo.models.common.feed_forward import softmax_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE
from moezoo.models.common.names import ATTENTION, DECODER

ASSUMES = ASSUMED_EVERYWHERE | {"hidden_act": ("silu",), "swiglu_alpha": (1.702,)}


def build(config: GptOssConfig) -> Decoder:
    # Fields of the hub's configs that not every transformers knows.
    limit = getattr(config, "swiglu_limit", 7.0)
    if limit <= 0:
        raise UnsupportedArchitectureError.of_field(config, "swiglu_limit", "above 0")

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            window=window_of(config, layer_idx),
            sinks=nn.Parameter(torch.empty(config.num_attention_heads)),
        )

    def feed_forward(layer_idx: int) -> FusedMoE:
        return FusedMoE(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            BiasedLogits(config.num_local_experts, softmax_route(config, renormalize=True)),
            activation=Gating("quick_gelu", limit=limit, up_offset=1.0),
            bias=True,
        )

    return pre_norm_decoder(config, attention, feed_forward)


EXPERTS = "model.layers.{L}.mlp.experts"
EACH = f"{EXPERTS}.{{E}}"

CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    Rule("layers.{L}.attn.sinks", "model.layers.{L}.self_attn.sinks"),
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.mlp.router.weight"),
    Rule("layers.{L}.mlp.route.bias", "model.layers.{L}.mlp.router.bias"),
    Rule(
        "layers.{L}.mlp.w13",
        f"{EXPERTS}.gate_up_proj",
        shard="expert",
        view=("transpose", "deinterleave"),
    ),
    Rule(
        "layers.{L}.mlp.bias13",
        f"{EXPERTS}.gate_up_proj_bias",
        shard="expert",
        view="deinterleave_last",
    ),
    Rule("layers.{L}.mlp.w2", f"{EXPERTS}.down_proj", shard="expert", view="transpose"),
    Rule("layers.{L}.mlp.bias2", f"{EXPERTS}.down_proj_bias", shard="expert"),
    # Names in quantised checkpoints whose experts were turned into linear layers first.
    *(
        Rule(target, *(f"{EACH}.{part}_proj.{kind}" for part in parts), shard="expert")
        for target, kind, parts in (
            ("layers.{L}.mlp.w13", "weight", ("gate", "up")),
            ("layers.{L}.mlp.bias13", "bias", ("gate", "up")),
            ("layers.{L}.mlp.w2", "weight", ("down",)),
            ("layers.{L}.mlp.bias2", "bias", ("down",)),
        )
    ),
)

"""ERNIE 4.5 (Baidu, 2025): an fp32 router, softmax scores with a correction bias."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Ernie4_5_MoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import BiasedRoute, FusedMoE
from moezoo.layers.moe.routing import biased_topk
from moezoo.layers.norm import NormOfSum, normed
from moezoo.layers.rope import rotate_interleaved
from moezoo.loaders.mapping import Rule, Skip
from moezoo.models.common.attention import grouped_queries
from moezoo.models.common.feed_forward import dense_or_moe
from moezoo.models.common.fields import (
    ASSUMED_EVERYWHERE,
    AtLeast,
    check_head_bias,
    experts_per_token,
)
from moezoo.models.common.names import (
    ATTENTION,
    CORRECTION_BIAS,
    DECODER,
    DENSE_MLP,
    EXPERTS,
    SHARED_EXPERTS,
)

ASSUMES = ASSUMED_EVERYWHERE | {
    "moe_layer_start_index": AtLeast(0),
    "moe_layer_interval": AtLeast(1),
    "moe_num_shared_experts": AtLeast(0),
    "moe_use_aux_free": (True, None),
}


class Fp32GateMoE(FusedMoE):
    """An MoE layer whose gate stays in fp32 whatever the model's dtype."""

    keep_dtype: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = nn.Parameter(torch.empty_like(self.gate, dtype=torch.float32))

    def router_logits(self, x: torch.Tensor | NormOfSum) -> torch.Tensor:
        x = normed(x)
        return F.linear(x.reshape(-1, x.shape[-1]).float(), self.gate)


class RowBias(BiasedRoute):
    """A router with a correction bias of shape [1, E], as in the checkpoints."""

    def __init__(self, num_experts: int, fn: Any) -> None:
        super().__init__(num_experts, fn)
        self.correction_bias = nn.Parameter(self.correction_bias[None], requires_grad=False)


def route(config: Ernie4_5_MoeConfig) -> RowBias:
    k = experts_per_token(config, config.num_experts)
    topk = partial(biased_topk, k=k, scoring="softmax", min_sum=config.moe_norm_min)
    return RowBias(config.num_experts, topk)


def build(config: Ernie4_5_MoeConfig) -> Decoder:
    if config.moe_layer_end_index is None:
        raise UnsupportedArchitectureError.of_field(config, "moe_layer_end_index", "a number")
    sparse = range(config.moe_layer_start_index, config.moe_layer_end_index + 1)
    dense = {
        layer_idx
        for layer_idx in range(config.num_hidden_layers)
        if layer_idx not in sparse or (layer_idx + 1) % config.moe_layer_interval
    }

    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config, qkv_bias=config.use_bias, out_bias=config.use_bias, rotate=rotate_interleaved
        )

    feed_forward = dense_or_moe(
        config,
        route,
        dense=dense,
        num_shared=config.moe_num_shared_experts or None,
        bias=config.use_bias,
        layer=Fp32GateMoE,
    )
    head_bias = check_head_bias(config, config.use_bias)
    decoder = partial(Decoder, head_bias=head_bias)
    return pre_norm_decoder(config, attention, feed_forward, decoder=decoder)


BIAS = "moe_statics.e_score_correction_bias"

CHECKPOINT = (
    *DECODER,
    *ATTENTION,
    *DENSE_MLP,
    *EXPERTS,
    Rule(CORRECTION_BIAS.target, f"model.layers.{{L}}.mlp.{BIAS}"),
    Rule(CORRECTION_BIAS.target, f"model.layers.{{L}}.mlp.gate.{BIAS}"),
    *SHARED_EXPERTS,
    Skip("model.mtp_{*}", "multi-token prediction"),
)

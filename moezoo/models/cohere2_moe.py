"""Command A+ (Cohere, 2026): attention and experts beside each other, after one norm."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cohere2MoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.context import Context
from moezoo.layers.decoder import Decoder, DecoderLayer, ScaledDecoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.routing import softmax_topk, topk_sigmoid
from moezoo.layers.norm import LayerNorm, NormOfSum, RMSNorm, input_for
from moezoo.layers.rope import rotate_interleaved, unrotated
from moezoo.models.attentions import attention_biases, grouped_queries, window_of
from moezoo.models.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.mixtures import listed_layers, mixture, mlp
from moezoo.models.names import ATTENTION, DECODER, DENSE_MLP, EXPERTS, SHARED_EXPERTS

ASSUMES = ASSUMED_EVERYWHERE | {
    "expert_selection_fn": ("softmax", "sigmoid"),
    "shared_expert_combination_strategy": ("average", "sum"),
    "use_qk_norm": (False, None),
    "use_parallel_block": (True, None),
}


class ParallelLayer(DecoderLayer):
    """x + attn(norm(x)) + mlp(norm(x))."""

    def __init__(self, *args: Any, **modules: Any) -> None:
        super().__init__(*args, **modules)
        del self.mlp_norm

    def forward(
        self, x: torch.Tensor, update: torch.Tensor | None, context: Context, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.attn_norm.of_sum(x, update)
        attended = self.attn(input_for(self.attn, normed), context, layer_idx)
        return normed.sum, attended + self.mlp(input_for(self.mlp, normed))


class AveragedMoE(FusedMoE):
    """The mean of what the routed experts and the shared ones give."""

    def forward(self, x: torch.Tensor | NormOfSum) -> torch.Tensor:
        return super().forward(x) / 2


def build(config: Cohere2MoeConfig) -> Decoder:
    dense = listed_layers(config)
    k = experts_per_token(config, config.num_experts)
    route = partial(softmax_topk, k=k, renormalize=True)
    if config.expert_selection_fn == "sigmoid":
        route = partial(topk_sigmoid, k=k, renormalize=config.norm_topk_prob)
    averages = config.num_shared_experts and config.shared_expert_combination_strategy == "average"
    norm: Any = RMSNorm
    if config.rms_norm_eps is None:
        norm = lambda dim, _: LayerNorm(dim, config.layer_norm_eps, bias=False)  # noqa: E731
    if dense and config.prefix_dense_intermediate_size is None:
        raise UnsupportedArchitectureError.of_field(
            config, "prefix_dense_intermediate_size", "a number where layers are dense"
        )

    def attention(layer_idx: int) -> GroupedQueryAttention:
        window = window_of(config, layer_idx)
        rotates = window is not None or (
            layer_idx in dense and config.prefix_dense_sliding_window_pattern == 1
        )
        return grouped_queries(
            config,
            **attention_biases(config),
            window=window,
            rotate=rotate_interleaved if rotates else unrotated,
        )

    def feed_forward(layer_idx: int) -> nn.Module:
        if layer_idx in dense:
            return mlp(config, config.prefix_dense_intermediate_size)
        width, num_shared = config.intermediate_size, config.num_shared_experts
        shared = mlp(config, width * num_shared) if num_shared else None
        layer = AveragedMoE if averages else FusedMoE
        return mixture(config, width, route, layer=layer, shared=shared)

    return pre_norm_decoder(
        config,
        attention,
        feed_forward,
        norm=norm,
        layer=ParallelLayer,
        decoder=partial(ScaledDecoder, logit_scale=config.logit_scale),
    )


CHECKPOINT = (*DECODER, *ATTENTION, *DENSE_MLP, *EXPERTS, *SHARED_EXPERTS)

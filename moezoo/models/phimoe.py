"""Phi-3.5-MoE (Microsoft, 2024): LayerNorm, and a router that chooses one expert after another."""

from functools import partial

import torch
from transformers import PhimoeConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.moe import FusedMoE
from moezoo.layers.moe.routing import sparsemixer
from moezoo.layers.norm import LayerNorm
from moezoo.layers.rope import RotaryEmbedding, Rotation
from moezoo.loaders.mapping import Rule
from moezoo.models.attentions import attention_biases, grouped_queries
from moezoo.models.fields import ASSUMED_EVERYWHERE, check_head_bias, experts_per_token
from moezoo.models.mixtures import mixture
from moezoo.models.names import ATTENTION, BLOCK_SPARSE_MOE, DECODER, EXPERTS

ASSUMES = ASSUMED_EVERYWHERE | {"num_experts_per_tok": (2,)}


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Short factors at any length, as in transformers; the config has what multiplies the result.

    It is `long_mscale` where a sequence is longer than the original context, else `short_mscale`.
    """

    def __init__(self, config: PhimoeConfig) -> None:
        super().__init__(config)
        if self.dim != self.config.head_dim or self.rope_type not in ("default", "longrope"):
            raise UnsupportedArchitectureError.of_field(
                config, "rope_parameters", "'default' or 'longrope' for whole heads"
            )
        if self.rope_type == "longrope":
            names = ("short_mscale", "long_mscale")
            self.mscales = [config.rope_parameters[name] for name in names]
            self.scale = 1.0
            self.long_inv_freq = self.inv_freq

    @property
    def depends_on_length(self) -> bool:
        return self.rope_type == "longrope" and self.mscales[0] != self.mscales[1]

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        if self.rope_type == "default":
            return super().forward(positions, dtype)
        cos, sin = super().forward(positions, torch.float32)
        short, long = self.mscales
        scale = torch.where(positions.max() >= self.context, long, short)
        return (cos * scale).to(dtype), (sin * scale).to(dtype)


def build(config: PhimoeConfig) -> Decoder:
    def attention(layer_idx: int) -> GroupedQueryAttention:
        return grouped_queries(
            config,
            **attention_biases(config),
            window=config.sliding_window,
        )

    k = experts_per_token(config, config.num_local_experts)
    route = partial(sparsemixer, k=k, jitter=config.router_jitter_noise)

    def feed_forward(layer_idx: int) -> FusedMoE:
        return mixture(config, config.intermediate_size, route)

    head_bias = check_head_bias(config, config.lm_head_bias)
    return pre_norm_decoder(
        config,
        attention,
        feed_forward,
        rope=ScaledRotaryEmbedding(config),
        norm=LayerNorm,
        decoder=partial(Decoder, head_bias=head_bias),
    )


CHECKPOINT = (
    *DECODER,
    Rule("layers.{L}.attn_norm.bias", "model.layers.{L}.input_layernorm.bias"),
    Rule("layers.{L}.mlp_norm.bias", "model.layers.{L}.post_attention_layernorm.bias"),
    Rule("norm.bias", "model.norm.bias"),
    *ATTENTION,
    *BLOCK_SPARSE_MOE,
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.mlp.router.weight"),
    *EXPERTS,
)

"""LongCat-Flash (Meituan, 2025): experts beside a second attention, and some that do nothing."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LongcatFlashConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.context import Context, Keys
from moezoo.layers.decoder import Decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.mlp import GatedMLP
from moezoo.layers.moe import BiasedRoute, FusedMoE
from moezoo.layers.moe.routing import grouped_topk
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for
from moezoo.layers.rope import rope_of_whole_heads, rotate_interleaved
from moezoo.loaders.mapping import Rule
from moezoo.models.deepseek_v2 import latent_attention
from moezoo.models.fields import ASSUMED_EVERYWHERE, experts_per_token
from moezoo.models.mixtures import mlp
from moezoo.models.names import AROUND_LAYERS, EXPERTS, MLA, TOKEN_PREDICTION, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE | {
    "layer_types": (None,),
    "sliding_window": (None,),
    "router_bias": (False,),
    # Of the release, not read by transformers.
    "attention_method": ("MLA",),
    "mla_scale_q_lora": (True,),
    "mla_scale_kv_lora": (True,),
    "zero_expert_type": ("identity", None),
}


class ScaledLatentAttention(MultiHeadLatentAttention):
    """Queries are multiplied by `q_factor`, and the normed latents by `latent_factor`.

    Keys, but for what is rotated, and values are linear in latents: it is done to queries and
    outputs, and the cache holds what others have.
    """

    def __init__(
        self, *arguments: Any, q_factor: float, latent_factor: float, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.scale *= q_factor
        self.latent_factor = latent_factor

    def _attend_to_latents(self, q: Tensor, keys: Keys, context: Context) -> Tensor:
        return self.latent_factor * super()._attend_to_latents(self._scaled(q), keys, context)

    def _attend_to_heads(self, q: Tensor, keys: Keys, context: Context) -> Tensor:
        return self.latent_factor * super()._attend_to_heads(self._scaled(q), keys, context)

    def _scaled(self, q: Tensor) -> Tensor:
        unrotated = q[..., : self.nope_dim] * self.latent_factor
        return torch.cat((unrotated, q[..., self.nope_dim :]), -1)


class ZeroExpertMoE(FusedMoE):
    """A mixture that can choose `num_zero` experts more, which give back what they get."""

    def __init__(self, *arguments: Any, num_zero: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        num_experts, hidden_size = self.gate.shape
        self.gate = nn.Parameter(torch.empty(num_experts + num_zero, hidden_size))
        self.num_zero = num_zero

    @property
    def num_experts(self) -> int:
        return len(self.gate) - self.num_zero

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        zero = topk_ids >= self.num_experts
        y = super().routed(x, topk_weights, topk_ids.masked_fill(zero, -1))
        return y + (x * (topk_weights * zero).sum(-1, keepdim=True)).to(x.dtype)


class ShortcutLayer(nn.Module):
    """Two layers of attention and a dense mlp. The experts see what the first mlp sees, and are
    added behind the second, so that they may be computed beside all that is between."""

    def __init__(
        self,
        attn: list[MultiHeadLatentAttention],
        dense: list[GatedMLP],
        mlp: FusedMoE,
        *,
        eps: float,
    ) -> None:
        super().__init__()
        dim = mlp.gate.shape[1]
        self.attn_norm = nn.ModuleList(RMSNorm(dim, eps) for _ in attn)
        self.attn = nn.ModuleList(attn)
        self.mlp_norm = nn.ModuleList(RMSNorm(dim, eps) for _ in attn)
        self.dense = nn.ModuleList(dense)
        self.mlp = mlp

    def forward(
        self, x: Tensor, update: Tensor | None, context: Context, layer_idx: int
    ) -> tuple[Tensor, Tensor]:
        """As of a `DecoderLayer`."""
        normed = self._attended(0, x, update, context, layer_idx)
        shortcut = self.mlp(input_for(self.mlp, normed))
        update = self.dense[0](input_for(self.dense[0], normed))
        normed = self._attended(1, normed.sum, update, context, layer_idx)
        return normed.sum, self.dense[1](input_for(self.dense[1], normed)) + shortcut

    def _attended(
        self, half: int, x: Tensor, update: Tensor | None, context: Context, layer_idx: int
    ) -> NormOfSum:
        """What the mlp of this half sees."""
        attn_norm, mlp_norm = self.attn_norm[half], self.mlp_norm[half]
        assert isinstance(attn_norm, RMSNorm) and isinstance(mlp_norm, RMSNorm)
        normed = attn_norm.of_sum(x, update)
        attn = self.attn[half]
        update = attn(input_for(attn, normed), context, 2 * layer_idx + half)
        return mlp_norm.of_sum(normed.sum, update)


def build(config: LongcatFlashConfig) -> Decoder:
    hidden_size, num_zero = config.hidden_size, config.zero_expert_num or 0
    # Which some versions of transformers only say once they have built the model.
    config.num_hidden_layers = 2 * config.num_layers
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.qk_head_dim != width:
        raise UnsupportedArchitectureError.of_field(config, "qk_head_dim", str(width))
    if num_zero < 0:
        raise UnsupportedArchitectureError.of_field(config, "zero_expert_num", "0 or more")
    if config.q_lora_rank is None:
        raise UnsupportedArchitectureError.of_field(config, "q_lora_rank", "1 or more")
    num_choices = config.n_routed_experts + num_zero
    route = partial(
        grouped_topk,
        k=experts_per_token(config, num_choices),
        num_groups=1,
        topk_groups=1,
        scoring="softmax",
        renormalize=False,
        scaling=config.routed_scaling_factor,
    )

    scaled = partial(
        ScaledLatentAttention,
        q_factor=math.sqrt(hidden_size / config.q_lora_rank),
        latent_factor=math.sqrt(hidden_size / config.kv_lora_rank),
    )

    def attention() -> MultiHeadLatentAttention:
        return latent_attention(config, rotate_interleaved, layer=scaled)

    def experts() -> FusedMoE:
        return ZeroExpertMoE(
            hidden_size,
            config.expert_ffn_hidden_size,
            config.n_routed_experts,
            BiasedRoute(num_choices, route),
            num_zero=num_zero,
            activation=config.hidden_act,
        )

    layers = [
        ShortcutLayer(
            [attention(), attention()],
            [mlp(config, config.ffn_hidden_size) for _ in range(2)],
            experts(),
            eps=config.rms_norm_eps,
        )
        for _ in range(config.num_layers)
    ]
    return Decoder(
        config.vocab_size,
        hidden_size,
        layers,
        norm=RMSNorm(hidden_size, config.rms_norm_eps),
        rope=rope_of_whole_heads(config),
        tied=config.tie_word_embeddings,
    )


LAYER = "model.layers.{L}"

CHECKPOINT = (
    *AROUND_LAYERS,
    *(
        rule
        for half in "01"
        for rule in (
            Rule(f"layers.{{L}}.attn_norm.{half}.weight", f"{LAYER}.input_layernorm.{half}.weight"),
            Rule(
                f"layers.{{L}}.mlp_norm.{half}.weight",
                f"{LAYER}.post_attention_layernorm.{half}.weight",
            ),
            *(
                Rule(
                    one.target.replace("attn.", f"attn.{half}."),
                    *(name.replace("attn.", f"attn.{half}.") for name in one.sources),
                )
                for one in MLA
            ),
            *gated_mlp(f"layers.{{L}}.dense.{half}", f"{LAYER}.mlps.{half}"),
        )
    ),
    Rule("layers.{L}.mlp.gate", f"{LAYER}.mlp.router.classifier.weight"),
    Rule("layers.{L}.mlp.route.correction_bias", f"{LAYER}.mlp.router.e_score_correction_bias"),
    *EXPERTS,
    *TOKEN_PREDICTION,
)

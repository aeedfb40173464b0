"""Kimi Linear (Moonshot AI, 2025): delta attention, latent attention without positions in every
fourth layer, DeepSeek-V3's MoE layers."""

from transformers import KimiLinearConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.kimi_delta_attention import KimiDeltaAttention
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import NoRotation, rotate_half
from moezoo.loaders.mapping import Rule
from moezoo.models.common.feed_forward import dense_by_list_and_count, dense_or_moe, sigmoid_route
from moezoo.models.common.fields import ASSUMED_EVERYWHERE, AtLeast
from moezoo.models.common.latent_attention import LATENT_SIZES, unscaled_latent_attention
from moezoo.models.common.names import BLOCK_SPARSE_MOE, DECODER, DEEPSEEK_MOE, MLA, gated_mlp

ASSUMES = ASSUMED_EVERYWHERE | {
    **LATENT_SIZES,
    "linear_num_heads": AtLeast(1),
    "linear_head_dim": AtLeast(1),
    "linear_conv_kernel_dim": AtLeast(1),
    "mla_use_nope": (True,),
    "moe_layer_freq": (1,),
    "moe_router_activation_func": ("sigmoid",),
    "rope_parameters": (None,),
    "tie_word_embeddings": (False,),  # transformers would not tie them
}


def build(config: KimiLinearConfig) -> Decoder:
    if config.qk_rope_head_dim % 2:
        raise UnsupportedArchitectureError.of_field(config, "qk_rope_head_dim", "an even number")

    def attention(layer_idx: int) -> SequenceMixer:
        if config.layer_types[layer_idx] == "full_attention":
            return unscaled_latent_attention(config, rotate_half)
        num_heads, head_dim = config.linear_num_heads, config.linear_head_dim
        return KimiDeltaAttention(
            config.hidden_size,
            num_heads,
            head_dim,
            conv=CausalConvolution(
                3 * num_heads * head_dim, config.linear_conv_kernel_dim, config.hidden_act
            ),
            norm=RMSNorm(head_dim, config.rms_norm_eps),
        )

    feed_forward = dense_or_moe(
        config,
        sigmoid_route,
        dense=dense_by_list_and_count(config),
        num_shared=config.n_shared_experts,
    )
    # The part of a key that other models rotate exists, shared by all heads, and is not rotated.
    return pre_norm_decoder(
        config, attention, feed_forward, rope=NoRotation(config.qk_rope_head_dim)
    )


NET = "model.layers.{L}.self_attn"
MOE = "model.layers.{L}.block_sparse_moe"

CHECKPOINT = (
    *DECODER,
    *MLA,
    *(
        Rule("layers.{L}.attn.x_proj.weight", *(f"{NET}.{name}.weight" for name in names))
        for names in (
            ("q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj"),
            ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj"),
        )
    ),
    Rule(
        "layers.{L}.attn.conv.weight", *(f"{NET}.{part}_conv1d.weight" for part in ("q", "k", "v"))
    ),
    Rule("layers.{L}.attn.conv.weight", f"{NET}.conv1d.weight"),
    *(
        Rule(f"layers.{{L}}.attn.{ours}", f"{NET}.{gate}{theirs}")
        for ours, theirs in (
            ("decay.weight", "f_b_proj.weight"),
            ("A_log", "A_log"),
            ("dt_bias", "dt_bias"),
        )
        for gate in ("", "forget_gate.")
    ),
    Rule("layers.{L}.attn.z.weight", f"{NET}.g_b_proj.weight"),
    Rule("layers.{L}.attn.norm.weight", f"{NET}.o_norm.weight"),
    *BLOCK_SPARSE_MOE,
    Rule("layers.{L}.mlp.route.correction_bias", f"{MOE}.gate.e_score_correction_bias"),
    *gated_mlp("layers.{L}.mlp.shared", f"{MOE}.shared_experts"),
    *DEEPSEEK_MOE,
    *gated_mlp("layers.{L}.mlp", MOE),
)
"""Names in checkpoints of the hub and in those that transformers writes.

The last rules are dense layers as only transformers names them.
"""

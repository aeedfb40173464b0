"""Granite 4 hybrid (IBM, 2025): Granite MoE with state-space layers, some of them attention."""

from transformers import GraniteMoeHybridConfig

from moezoo.layers.convolution import CausalConvolution
from moezoo.layers.decoder import Decoder
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import RMSNorm
from moezoo.layers.rope import rotate_half, unrotated
from moezoo.layers.state_space import StateSpace
from moezoo.loaders.mapping import Rule
from moezoo.models import granitemoe
from moezoo.models.common.fields import AtLeast
from moezoo.models.granitemoe import granite_attention, granite_decoder

ASSUMES = granitemoe.ASSUMES | {
    "mamba_n_heads": AtLeast(1),
    "mamba_d_head": AtLeast(1),
    "mamba_d_state": AtLeast(1),
    "mamba_d_conv": AtLeast(1),
    "mamba_proj_bias": (False,),  # in transformers the convolution would see the bias of padding
    "mamba_n_groups": (1,),  # with more groups, versions of transformers norm differently
    "time_step_limit": ((0.0, float("inf")),),  # transformers ignores it after the prompt
}


def build(config: GraniteMoeHybridConfig) -> Decoder:
    dim = config.mamba_n_heads * config.mamba_d_head
    rotate = rotate_half if config.position_embedding_type == "rope" else unrotated

    def attention(layer_idx: int) -> SequenceMixer:
        if config.layer_types[layer_idx] == "full_attention":
            return granite_attention(config, rotate=rotate)
        conv = CausalConvolution(
            dim + 2 * config.mamba_d_state,
            config.mamba_d_conv,
            config.hidden_act,
            bias=config.mamba_conv_bias,
        )
        return StateSpace(
            config.hidden_size,
            config.mamba_n_heads,
            config.mamba_d_head,
            state_dim=config.mamba_d_state,
            conv=conv,
            norm=RMSNorm(dim, config.rms_norm_eps),
        )

    return granite_decoder(config, attention, config.shared_intermediate_size)


CHECKPOINT = (
    *granitemoe.CHECKPOINT,
    *(
        Rule(f"layers.{{L}}.attn.{ours}", f"model.layers.{{L}}.mamba.{theirs}")
        for ours, theirs in (
            ("zxbcdt.weight", "in_proj.weight"),
            ("conv.weight", "conv1d.weight"),
            ("conv.bias", "conv1d.bias"),
            ("A_log", "A_log"),
            ("dt_bias", "dt_bias"),
            ("D", "D"),
            ("norm.weight", "norm.weight"),
            ("out.weight", "out_proj.weight"),
        )
    ),
)

"""Config fields that several architectures read, checked."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.moe import ACTIVATIONS

ASSUMED_EVERYWHERE = {"hidden_act": tuple(ACTIVATIONS), "output_router_logits": (False,)}
"""What every model file's `ASSUMES` holds."""

# Where a config has the field. What may be 0 is a part that is then not there.
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "num_local_experts",
    "n_routed_experts",
    "kv_lora_rank",
    "index_head_dim",
    "index_n_heads",
    "index_topk",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "conv_L_cache",
    "mamba_d_conv",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_n_groups",
    "mamba_n_heads",
    "linear_conv_kernel_dim",
    "linear_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "max_position_embeddings",
    "moe_layer_interval",
)
NOT_NEGATIVE_OR_NONE = ("n_shared_experts",)
POSITIVE_OR_NONE = ("head_dim", "q_lora_rank")
NOT_NEGATIVE = (
    "intermediate_size",
    "num_experts",
    "num_shared_experts",
    "num_dense_layers",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_num_shared_experts",
    "moe_layer_start_index",
    "first_k_dense_replace",
)


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's own part of a multimodal config.json; any other config as it is.

    What the whole says of the head and of how weights are stored is said of the text model. Raises
    `TypeError` where the part is not an object.
    """
    if "text_config" not in raw:
        return dict(raw)
    text = raw["text_config"]
    if not isinstance(text, dict):
        raise TypeError(f"text_config is {text!r}, expected an object")
    dtypes = {field: raw[field] for field in ("dtype", "torch_dtype") if field in raw}
    text = dtypes | text | {"tie_word_embeddings": raw.get("tie_word_embeddings", False)}
    if "quantization_config" in raw:
        text["quantization_config"] = raw["quantization_config"]
    return text


def check_sizes(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedArchitectureError` for a size that no tensor can have.

    Also where the heads of keys are not as many for each head of queries.
    """
    for fields, low, or_none in (
        (POSITIVE, 1, False),
        (POSITIVE_OR_NONE, 1, True),
        (NOT_NEGATIVE, 0, False),
        (NOT_NEGATIVE_OR_NONE, 0, True),
    ):
        for field in fields:
            value = getattr(config, field, low)
            if value is None and or_none:
                continue
            # Some configs have a number for each layer.
            numbers = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int) and number >= low for number in numbers):
                raise UnsupportedArchitectureError.of_field(config, field, f"{low} or more")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedArchitectureError.of_field(
            config, "num_key_value_heads", f"a divisor of {config.num_attention_heads}"
        )


def check_head_bias(config: PreTrainedConfig, bias: bool) -> bool:
    """`bias`, whether the head has one; `UnsupportedArchitectureError` if it is the embedding."""
    if bias and config.tie_word_embeddings:
        raise UnsupportedArchitectureError.of_field(
            config, "tie_word_embeddings", "False for a head with a bias"
        )
    return bias


def experts_per_token(config: PreTrainedConfig, num_experts: int) -> int:
    """`config.num_experts_per_tok`, of `num_experts` that a token can choose from.

    Raises `UnsupportedArchitectureError` where there are not as many.
    """
    if not 1 <= (config.num_experts_per_tok or 0) <= num_experts:
        raise UnsupportedArchitectureError.of_field(
            config, "num_experts_per_tok", f"1 to {num_experts}"
        )
    chosen: int = config.num_experts_per_tok
    return chosen

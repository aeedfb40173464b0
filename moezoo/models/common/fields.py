"""Checks of config fields, and the fields that several architectures read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.moe import ACTIVATIONS


@dataclass(frozen=True)
class AtLeast:
    """Values of a size field in `ASSUMES`: an integer of `low` or more, or a list of such integers.

    A list has one integer for each layer. `or_none` allows None too.
    """

    low: int
    or_none: bool = False

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.or_none
        numbers = value if isinstance(value, list) else [value]
        return all(isinstance(number, int) and number >= self.low for number in numbers)

    def __str__(self) -> str:
        return f"{self.low} or more"


Assumptions = Mapping[str, tuple[Any, ...] | AtLeast]
"""Field of a config -> the values that a page supports."""

ASSUMED_EVERYWHERE: dict[str, tuple[Any, ...] | AtLeast] = {
    "hidden_act": tuple(ACTIVATIONS),
    "output_router_logits": (False,),
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "moe_intermediate_size",
            "num_local_experts",
            "n_routed_experts",
            "decoder_sparse_step",
        ),
        AtLeast(1),
    ),
    "head_dim": AtLeast(1, or_none=True),
    # A model without the part has a size of 0.
    **dict.fromkeys(
        ("intermediate_size", "num_experts", "num_shared_experts", "first_k_dense_replace"),
        AtLeast(0),
    ),
    "n_shared_experts": AtLeast(0, or_none=True),
}
"""The part of `ASSUMES` that every page has. A page adds the fields that only it reads."""


def check_fields(config: PreTrainedConfig, assumes: Assumptions) -> None:
    """Raise `UnsupportedArchitectureError` for a field whose value is not among those assumed.

    Fields that the config does not have are skipped. Also refused is a number of query heads that
    is no multiple of the number of key heads.
    """
    for field, supported in assumes.items():
        if hasattr(config, field) and getattr(config, field) not in supported:
            raise UnsupportedArchitectureError.of_field(
                config,
                field,
                str(supported)
                if isinstance(supported, AtLeast)
                else " or ".join(map(repr, supported)),
            )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedArchitectureError.of_field(
            config, "num_key_value_heads", f"a divisor of {config.num_attention_heads}"
        )


def check_head_bias(config: PreTrainedConfig, bias: bool) -> bool:
    """Return `bias`, whether the head has one.

    Raises `UnsupportedArchitectureError` for a bias where the head is the embedding.
    """
    if bias and config.tie_word_embeddings:
        raise UnsupportedArchitectureError.of_field(
            config, "tie_word_embeddings", "False for a head with a bias"
        )
    return bias


def experts_per_token(config: PreTrainedConfig, num_experts: int) -> int:
    """Return `config.num_experts_per_tok`, the number of experts that a token chooses.

    Raises `UnsupportedArchitectureError` where it is not 1 to `num_experts`.
    """
    if not 1 <= (config.num_experts_per_tok or 0) <= num_experts:
        raise UnsupportedArchitectureError.of_field(
            config, "num_experts_per_tok", f"1 to {num_experts}"
        )
    chosen: int = config.num_experts_per_tok
    return chosen


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's part of a multimodal config.json; any other config as it is.

    The whole config's statements about the head, the dtype and quantisation are copied into the
    part. Raises `TypeError` where the part is not an object.
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

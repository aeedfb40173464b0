"""Config fields that several architectures read, checked."""

from transformers import PreTrainedConfig

from moezoo.errors import UnsupportedArchitectureError


def experts_per_token(config: PreTrainedConfig, num_experts: int) -> int:
    """`config.num_experts_per_tok`, of `num_experts` that a token can choose from.

    Raises `UnsupportedArchitectureError` where there are not as many.
    """
    if not config.num_experts_per_tok or config.num_experts_per_tok > num_experts:
        raise UnsupportedArchitectureError.of_field(
            config, "num_experts_per_tok", f"1 to {num_experts}"
        )
    chosen: int = config.num_experts_per_tok
    return chosen

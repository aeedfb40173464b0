"""Generation settings: how they are resolved, and which are refused."""

import math
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moezoo.generation.sampling import warpers

DEFAULT_MAX_NEW_TOKENS = 256


def resolve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    overrides: dict[str, Any],
) -> GenerationConfig:
    """Return a config with every field set: from `overrides`, `generation_config` or the model's.

    Raises `ValueError` for options that are unknown, out of range or not supported.
    """
    given = GenerationConfig() if generation_config is None else generation_config
    if given.max_length is not None or overrides.get("max_length") is not None:
        raise ValueError("max_length counts prompt and completion together; use max_new_tokens")
    # Private, as nothing public tells the defaults that `model.generate` would fill in.
    config, _ = model._prepare_generation_config(given)
    if unknown := config.update(**overrides):
        raise ValueError(f"unknown generation options: {', '.join(sorted(unknown))}")
    config.max_length = None
    if config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    if config.num_return_sequences != 1:
        raise ValueError(
            "num_return_sequences must be 1, every prompt gets one completion; "
            f"got {config.num_return_sequences}"
        )
    if config.pad_token_id is None:
        known = [tokenizer.pad_token_id, *as_list(config.eos_token_id)]
        config.pad_token_id = next((token for token in known if token is not None), None)
    _check(config)
    return config


def check_options(**options: Any) -> None:
    """Raise `ValueError` for fields of `GenerationConfig` that are out of range."""
    _check(GenerationConfig(**options))


def _check(config: GenerationConfig) -> None:
    if config.do_sample:
        warpers(config, torch.device("cpu"))  # their constructors check the values
    penalty = config.repetition_penalty
    if penalty is not None and not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0 and finite, got {penalty}")
    if config.num_beams is not None and config.num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {config.num_beams}")
    for string in as_list(config.stop_strings):
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop_strings must be texts that are not empty, got {string!r}")


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, int | str) else list(value)

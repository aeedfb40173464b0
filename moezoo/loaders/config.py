"""What a checkpoint's configs say: the model, its dtype, and how to generate."""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from moezoo import registry
from moezoo.errors import CheckpointError, UnsupportedArchitectureError
from moezoo.loaders.checkpoint import Checkpoint
from moezoo.loaders.encodings import hub_scheme
from moezoo.loaders.files import CONFIG, GENERATION_CONFIG
from moezoo.loaders.mapping import TensorInfo
from moezoo.loaders.plan import dtype_name

_MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def transformers_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the checkpoint's transformers config, if moezoo has its architecture."""
    raw = dict(checkpoint.config)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.name}: {CONFIG} names no model_type")
    try:
        module = registry.architecture(model_type)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{checkpoint.name}: {error}") from error
    hub_scheme(raw.get("quantization_config"), checkpoint.name)
    try:
        raw = _with_special_floats(raw)
        if hasattr(module, "text_config"):
            raw = module.text_config(raw)
            model_type = raw["model_type"]
        if model_type not in CONFIG_MAPPING:
            raw["model_type"] = model_type = registry.ARCHITECTURES[model_type]
        config = CONFIG_MAPPING[model_type].from_dict(raw)
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise CheckpointError(f"{checkpoint.name}: {CONFIG} is not valid: {error}") from error
    config.name_or_path = checkpoint.name
    return config


def _with_special_floats(value: Any) -> Any:
    """Replace transformers' notation of numbers that JSON lacks, {"__float__": "Infinity"}, by
    floats."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_special_floats(inner) for key, inner in value.items()}
    return [_with_special_floats(inner) for inner in value] if isinstance(value, list) else value


def own_generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """Return the checkpoint's generation config, if any; raises `CheckpointError` if it is
    invalid."""
    if GENERATION_CONFIG not in checkpoint.files.listing():
        return None
    try:
        return GenerationConfig.from_pretrained(checkpoint.config_folder)
    except (OSError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: {GENERATION_CONFIG} is not valid: {error}"
        ) from error


def own_dtype(config: PreTrainedConfig, tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the dtype that the config names, or else that of the first floating-point tensor.

    float32 where that is float64. Raises `UnsupportedArchitectureError` if the config names
    another dtype.
    """
    stored = (tensor.dtype for tensor in tensors.values())
    floating = (dtype for dtype in stored if dtype in (*_MODEL_DTYPES, torch.float64))
    return config_dtype(config, next(floating, torch.float32))


def config_dtype(config: PreTrainedConfig, default: torch.dtype) -> torch.dtype:
    """Return the dtype that the config names, or else `default`; otherwise as `own_dtype`."""
    dtype = config.dtype or default
    if dtype == torch.float64:
        return torch.float32  # no layer computes in float64
    if dtype not in _MODEL_DTYPES:
        raise UnsupportedArchitectureError(
            f"{config.name_or_path or config.model_type}: config.dtype is {dtype}, expected"
            f" {', '.join(map(dtype_name, _MODEL_DTYPES))} or float64; choose one with dtype"
        )
    return dtype


def requested_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Return the dtype asked for, None for "auto"; raises `ValueError` for anything else."""
    if dtype == "auto":
        return None
    names = {dtype_name(known): known for known in _MODEL_DTYPES}
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in _MODEL_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected 'auto' or one of {', '.join(names)}")
    return chosen

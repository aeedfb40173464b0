"""The table of architectures: which module builds a config's `model_type`."""

from importlib import import_module
from types import ModuleType

from transformers import PreTrainedConfig

from moezoo.errors import IN_TRANSFORMERS, UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder
from moezoo.models.common.fields import check_fields

ARCHITECTURES = {
    "afmoe": "afmoe",
    "cohere2_moe": "cohere2_moe",
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5_moe",
    "exaone_moe": "exaone_moe",
    "flex_olmo": "flex_olmo",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm_moe_dsa": "glm_moe_dsa",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitemoehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan_v1_moe",
    "hy_v3": "hy_v3",
    "gpt_oss": "gpt_oss",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "kimi_k25",
    "kimi_linear": "kimi_linear",
    "lfm2_moe": "lfm2_moe",
    "llama4": "llama4",
    "llama4_text": "llama4_text",
    "longcat_flash": "longcat_flash",
    "mellum": "mellum",
    "mimo_v2_flash": "mimo_v2_flash",
    "minimax_m2": "minimax_m2",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2_moe",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "solar_open": "solar_open",
}
"""`model_type` of a config -> name of the module in `moezoo.models`."""


def list_architectures() -> list[str]:
    """Return the model types that moezoo runs, sorted."""
    return sorted(ARCHITECTURES)


def architecture(model_type: str) -> ModuleType:
    """Return the module of a model type, with `build(config)`, `CHECKPOINT` and `ASSUMES`.

    Where checkpoints are multimodal it has `text_config(raw)` too, which returns the config.json
    that the text model alone would have.

    Raises `UnsupportedArchitectureError` for a model type that is not in the table.
    """
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} is not supported; supported are"
            f" {', '.join(list_architectures())}. {IN_TRANSFORMERS}"
        )
    return import_module(f"moezoo.models.{ARCHITECTURES[model_type]}")


def build(config: PreTrainedConfig) -> Decoder:
    """Return the decoder that `config` describes; under `torch.device("meta")` it takes no memory.

    Raises `UnsupportedArchitectureError` naming the model type, or the field whose value is not
    supported.
    """
    module = architecture(config.model_type)
    check_fields(config, module.ASSUMES)
    decoder: Decoder = module.build(config)
    return decoder

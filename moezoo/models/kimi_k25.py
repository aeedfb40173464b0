"""The text model of Kimi K2.5 (Moonshot AI, 2026), which is DeepSeek-V3; it is loaded as such."""

from collections.abc import Mapping
from typing import Any

from moezoo.loaders.mapping import Rule, Skip
from moezoo.models import deepseek_v3
from moezoo.models.common.fields import text_part
from moezoo.models.common.names import of_text_model, with_prefix

ASSUMES = deepseek_v3.ASSUMES

build = deepseek_v3.build


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's config.json, which is one of DeepSeek-V3.

    The head is tied to the embedding unless the config says otherwise.
    """
    return text_part({"tie_word_embeddings": True, **raw}) | {"model_type": "deepseek_v3"}


CHECKPOINT = (
    *with_prefix("language_model", deepseek_v3.CHECKPOINT),
    # Names in what transformers saves.
    *of_text_model(deepseek_v3.CHECKPOINT),
    Rule("lm_head.weight", "lm_head.weight"),
    *(
        Skip(f"{prefix}{part}.{{*}}", "the model of images")
        for prefix in ("", "model.")
        for part in ("vision_tower", "mm_projector")
    ),
)

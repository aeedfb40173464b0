"""The text model of Llama 4's checkpoints, which are multimodal; it is loaded as `llama4_text`."""

from collections.abc import Mapping
from typing import Any

from moezoo.loaders.mapping import Skip
from moezoo.models import llama4_text
from moezoo.models.common.fields import text_part
from moezoo.models.common.names import with_prefix

ASSUMES = llama4_text.ASSUMES

build = llama4_text.build


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's config.json, of type `llama4_text`."""
    return text_part(raw) | {"model_type": "llama4_text"}


CHECKPOINT = (
    *with_prefix("language_model", llama4_text.CHECKPOINT),
    Skip("vision_model.{*}", "the model of images"),
    Skip("multi_modal_projector.{*}", "the model of images"),
)

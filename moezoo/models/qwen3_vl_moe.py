"""The text model of Qwen3-VL-MoE (Alibaba, 2025), which is Qwen3-MoE.

It is loaded as Qwen3-MoE: transformers has no class for it without the vision model.
"""

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3VLMoeTextConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.loaders.mapping import Rule, Skip, View
from moezoo.models import qwen3_moe
from moezoo.models.common.fields import text_part
from moezoo.models.common.names import (
    ATTENTION,
    DECODER,
    DENSE_MLP,
    QK_NORM,
    each_expert,
    of_text_model,
)

ASSUMES = qwen3_moe.ASSUMES

build = qwen3_moe.build

MROPE = ("mrope_section", "mrope_interleaved")
"""Fields that divide a head's numbers among three axes; text has the same position on all."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's config.json: one of Qwen3-MoE, with renormalised routing weights.

    Raises `UnsupportedArchitectureError` where the shapes of the stored experts cannot tell whether
    they are transposed.
    """
    config = Qwen3VLMoeTextConfig.from_dict(text_part(raw))
    if 2 * config.moe_intermediate_size == config.hidden_size:
        raise UnsupportedArchitectureError.of_field(
            config,
            "moe_intermediate_size",
            "one by which to tell in which order experts are stored",
        )
    text = config.to_dict()
    rope = {name: value for name, value in text["rope_parameters"].items() if name not in MROPE}
    return text | {"model_type": "qwen3_moe", "norm_topk_prob": True, "rope_parameters": rope}


EXPERTS = "model.layers.{L}.mlp.experts"

ORDERS: tuple[View | None, ...] = ("transpose", None)

TEXT: tuple[Rule | Skip, ...] = (
    *DECODER,
    *ATTENTION,
    *QK_NORM,
    *DENSE_MLP,
    Rule("layers.{L}.mlp.gate", "model.layers.{L}.mlp.gate.weight"),
    # On the hub experts are transposed; as transformers writes them, they are not.
    *(
        Rule(f"layers.{{L}}.mlp.{ours}", f"{EXPERTS}.{theirs}", shard="expert", view=view)
        for ours, theirs in (("w13", "gate_up_proj"), ("w2", "down_proj"))
        for view in ORDERS
    ),
    *each_expert(EXPERTS),
)

CHECKPOINT = (*of_text_model(TEXT), Rule("lm_head.weight", "lm_head.weight"))

"""GLM-4.7-Flash (Z.ai, 2026): DeepSeek-V3 whose config lists the dense layers."""

from transformers import Glm4MoeLiteConfig

from moezoo.layers.decoder import Decoder
from moezoo.models import deepseek_v3
from moezoo.models.common.feed_forward import dense_by_list_and_count

ASSUMES = deepseek_v3.ASSUMES


def build(config: Glm4MoeLiteConfig) -> Decoder:
    return deepseek_v3.decoder_of(config, dense_by_list_and_count(config))


CHECKPOINT = deepseek_v3.CHECKPOINT

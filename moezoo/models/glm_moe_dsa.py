"""GLM-5 (Z.ai, 2026): DeepSeek-V3.2 whose indexer rotates neighbours as pairs."""

from transformers import GlmMoeDsaConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder
from moezoo.layers.rope import rotate_interleaved
from moezoo.models import deepseek_v32

ASSUMES = deepseek_v32.ASSUMES


def build(config: GlmMoeDsaConfig) -> Decoder:
    if set(config.indexer_types) != {"full"}:
        raise UnsupportedArchitectureError.of_field(
            config, "indexer_types", "'full', an indexer in every layer"
        )
    return deepseek_v32.sparse_decoder(config, rotate_interleaved)


CHECKPOINT = deepseek_v32.CHECKPOINT

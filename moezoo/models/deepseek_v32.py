"""DeepSeek-V3.2 (DeepSeek-AI, 2025): DeepSeek-V3 that attends to the keys an indexer chooses."""

from functools import partial

from transformers import DeepseekV32Config, GlmMoeDsaConfig

from moezoo.errors import UnsupportedArchitectureError
from moezoo.layers.decoder import Decoder, pre_norm_decoder
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.rope import Rotate, rotate_half, rotate_interleaved
from moezoo.layers.sparse_attention import SparseLatentAttention
from moezoo.loaders.mapping import Rule
from moezoo.models import deepseek_v3
from moezoo.models.deepseek_v2 import latent_attention
from moezoo.models.mixtures import dense_or_mixture, listed_layers, sigmoid_route

ASSUMES = deepseek_v3.ASSUMES | {"mlp_bias": (False,)}

KINDS = ("indexed_attention", "deepseek_sparse_attention")
"""What newer and older versions of transformers call such layers."""


def sparse_decoder(config: DeepseekV32Config | GlmMoeDsaConfig, rotate_index: Rotate) -> Decoder:
    """`rotate_index` is what positions do to the indexer's queries and keys."""
    if set(config.layer_types) - set(KINDS):
        raise UnsupportedArchitectureError.of_field(config, "layer_types", " or ".join(KINDS))
    if config.q_lora_rank is None:
        raise UnsupportedArchitectureError.of_field(config, "q_lora_rank", "1 or more")
    if config.index_head_dim < config.qk_rope_head_dim:
        raise UnsupportedArchitectureError.of_field(
            config, "index_head_dim", f"qk_rope_head_dim, {config.qk_rope_head_dim}, or more"
        )

    def attention(layer_idx: int) -> MultiHeadLatentAttention:
        sparse = partial(
            SparseLatentAttention,
            index_heads=config.index_n_heads,
            index_dim=config.index_head_dim,
            topk=config.index_topk,
            rotate_index=rotate_index,
            layer_type=config.layer_types[layer_idx],
        )
        return latent_attention(config, rotate_interleaved, layer=sparse)

    feed_forward = dense_or_mixture(
        config,
        sigmoid_route(config),
        dense=listed_layers(config),
        num_shared=config.n_shared_experts,
    )
    return pre_norm_decoder(config, attention, feed_forward)


def build(config: DeepseekV32Config) -> Decoder:
    return sparse_decoder(config, rotate_half)


INDEXER = "model.layers.{L}.self_attn.indexer"

CHECKPOINT = (
    *deepseek_v3.CHECKPOINT,
    Rule("layers.{L}.attn.index_q.weight", f"{INDEXER}.wq_b.weight"),
    Rule("layers.{L}.attn.index_k.weight", f"{INDEXER}.wk.weight"),
    Rule("layers.{L}.attn.index_norm.weight", f"{INDEXER}.k_norm.weight"),
    Rule("layers.{L}.attn.index_norm.bias", f"{INDEXER}.k_norm.bias"),
    Rule("layers.{L}.attn.index_weights.weight", f"{INDEXER}.weights_proj.weight"),
)

"""The models of the benchmark: the published shapes, and some of the same kind for a CPU."""

from typing import Any

from cases import qwen3_30b
from transformers import DeepseekV3Config, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


def qwen3(num_layers: int, *, small: bool) -> PreTrainedConfig:
    if small:
        return Qwen3MoeConfig(
            **SMALL,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            norm_topk_prob=True,
        )
    config = qwen3_30b()
    config.num_hidden_layers = num_layers
    return config


def deepseek_v3(num_layers: int, *, small: bool, vocab_size: int = 16384) -> PreTrainedConfig:
    """Return a config of DeepSeek-V3 with MoE layers only."""
    if small:
        return DeepseekV3Config(
            **SMALL,
            num_hidden_layers=2,
            num_key_value_heads=4,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=128,
            first_k_dense_replace=0,
        )
    return DeepseekV3Config(
        num_hidden_layers=num_layers, vocab_size=vocab_size, first_k_dense_replace=0
    )


def mixtral(num_layers: int, *, small: bool) -> PreTrainedConfig:
    if small:
        return MixtralConfig(
            **SMALL,
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=128,
            num_local_experts=4,
        )
    return MixtralConfig(num_hidden_layers=num_layers)

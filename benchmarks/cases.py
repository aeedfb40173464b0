"""The models that whole-model benchmarks run, all with random weights, and their twins.

A twin is transformers' own model over the memory of moezoo's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from moezoo.assets import tiny_model
from moezoo.causal_lm import MoECausalLM
from moezoo.loaders.mapping import layout, parameter_infos
from moezoo.registry import architecture

TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
}


def tiny_mixtral() -> PreTrainedConfig:
    return MixtralConfig(
        **TINY,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )


def tiny_qwen3() -> PreTrainedConfig:
    return AutoConfig.from_pretrained(tiny_model(), max_position_embeddings=2048)


def tiny_deepseek() -> PreTrainedConfig:
    return DeepseekV3Config(
        **TINY,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    )


def olmoe(num_layers: int) -> PreTrainedConfig:
    return OlmoeConfig(intermediate_size=1024, num_hidden_layers=num_layers)


def qwen3_30b() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        num_hidden_layers=48,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
        max_position_embeddings=40960,
    )


def deepseek_v2_lite() -> PreTrainedConfig:
    return DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        intermediate_size=10944,
        first_k_dense_replace=1,
        max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    )


CASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny-mixtral": tiny_mixtral,
    "tiny-qwen3-moe": tiny_qwen3,
    "tiny-deepseek-v3": tiny_deepseek,
    "olmoe-4-layers": lambda: olmoe(4),
    "olmoe-1b-7b": lambda: olmoe(16),
    "deepseek-v2-lite": deepseek_v2_lite,
    "qwen3-30b-a3b": qwen3_30b,
}
DEFAULT_CASES = {
    "cpu": ["tiny-mixtral", "tiny-qwen3-moe", "tiny-deepseek-v3", "olmoe-4-layers"],
    "cuda": ["olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b"],
}

TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}
"""Largest allowed relative difference of logits. In 16 bits, near ties in the routers go either way
in every layer; experts that are computed wrongly are off by about 1."""


def in_transformers(model: MoECausalLM) -> nn.Module:
    """Return transformers' model over the same memory: every parameter is a view of one of ours."""
    # A fresh config: moezoo's names the attention and the experts that moezoo's model is given,
    # and those that transformers chooses for its own are faster.
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    # The last rule of a target is the stacked layout, which transformers holds in memory.
    rules = tuple(reversed(architecture(model.config.model_type).CHECKPOINT))
    own = model.decoder.state_dict()
    infos = parameter_infos(model.decoder, model.dtype)
    views = {copy.source: own[copy.target][copy.target_index] for copy in layout(rules, infos)}
    twin.load_state_dict(views, strict=not model.config.tie_word_embeddings, assign=True)
    twin.tie_weights()
    rope = type(twin.model.rotary_emb)
    twin.model.rotary_emb = rope(config=model.config).to(model.device)
    left = [name for name, tensor in twin.named_parameters() if tensor.is_meta]
    assert not left, left
    return twin.eval()

"""Tiny odd-shaped configurations of every architecture, and weights that make each part matter.

Sequences in the tests have up to 13 tokens; windows and original contexts here are shorter.
"""

import math
from typing import Any

import torch
import transformers

Config = dict[str, Any]

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
ROPE: dict[str, Config] = {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "yarn": YARN | {"original_max_position_embeddings": 24},
    "yarn-exact": YARN
    | {
        "original_max_position_embeddings": 24,
        "truncate": False,
        "beta_fast": 8,
        "beta_slow": 2,
        "attention_factor": 1.3,
    },
    "yarn-mscale": YARN
    | {"original_max_position_embeddings": 24, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn-mscale-all": YARN | {"original_max_position_embeddings": 24, "mscale_all_dim": 0.9},
}


def longrope(pairs: int, **more: Any) -> Config:
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.7 * i for i in range(pairs)],
        "original_max_position_embeddings": 8,
    } | more


COMMON = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": None}

MIXTRAL = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
}
MROPE = {
    "rope_type": "default",
    "rope_theta": 200.0,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
QWEN3 = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}
QWEN2 = COMMON | {
    "hidden_size": 24,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}
OLMOE = COMMON | {
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 9,
    "num_experts_per_tok": 4,
    "pad_token_id": None,
}
LATENT = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 7,
    "q_lora_rank": 11,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "bos_token_id": None,
}
# transformers turns this rope into complex numbers, for which the rank has to be even.
DEEPSEEK_V2 = LATENT | {"topk_method": "greedy", "n_shared_experts": 2, "kv_lora_rank": 6}
DEEPSEEK_V3 = LATENT | {"n_shared_experts": 1, "n_group": 3, "topk_group": 2}
GPT_OSS = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "rope_parameters": ROPE["yarn-exact"],
}
# Another one is not in every transformers.
SWIGLU_LIMIT = {"swiglu_limit": 1.5} if hasattr(transformers.GptOssConfig(), "swiglu_limit") else {}

# DeepSeek-V3's router on grouped queries.
GROUPED = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "bos_token_id": None,
}
GLM4 = GROUPED | {"n_routed_experts": 12, "n_shared_experts": 1, "first_k_dense_replace": 1}
GLM4_LITE = {k: v for k, v in LATENT.items() if k != "first_k_dense_replace"} | {
    "n_shared_experts": 1
}
DOTS1 = GLM4 | {"sliding_window": None, "routed_scaling_factor": 2.5}
SOLAR = {k: v for k, v in GLM4.items() if k not in ("intermediate_size", "first_k_dense_replace")}
EXAONE = GROUPED | {"num_experts": 12, "sliding_window": 5, "num_hidden_layers": 5}
HY_V3 = GROUPED | {"num_experts": 9}

MIMO = GROUPED | {
    "n_routed_experts": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 12,
    "v_head_dim": 8,
    "sliding_window": 5,
}
FLEX_OLMO = OLMOE | {"num_experts": 7, "num_experts_per_tok": 3}
GRANITE = MIXTRAL | {
    "embedding_multiplier": 1.7,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}
ERNIE = COMMON | {
    "hidden_size": 24,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 9,
    "moe_k": 3,
    "bos_token_id": None,
}
HUNYUAN = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 7,
    "moe_topk": 3,
    "bos_token_id": None,
}
PHIMOE = MIXTRAL | {"num_local_experts": 6, "router_jitter_noise": 0.3}
MINIMAX_M2 = MIXTRAL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def ropes(full: float, sliding: float, rope: Config | None = None) -> Config:
    """A rotation for full layers and one for sliding layers, of these shares of a head."""
    kinds = {
        "full_attention": (rope or {"rope_type": "default", "rope_theta": 500.0}, full),
        "sliding_attention": ({"rope_type": "default", "rope_theta": 50.0}, sliding),
    }
    return {
        "rope_parameters": {
            kind: own | {"partial_rotary_factor": share} for kind, (own, share) in kinds.items()
        }
    }


def partial_rotary(factor: float, rope: Config | None = None) -> Config:
    rope = rope or {"rope_type": "default", "rope_theta": 100.0}
    return {"rope_parameters": rope | {"partial_rotary_factor": factor}}


AFMOE = GROUPED | {
    "num_experts": 9,
    "num_hidden_layers": 5,
    "sliding_window": 5,
    "route_scale": 2.8,
    "mup_enabled": True,
}
MELLUM = QWEN3 | {
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": ["full_attention", *["sliding_attention"] * 3],
}
COHERE2 = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 14,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "sliding_window": 5,
    "logit_scale": 0.3,
    "bos_token_id": None,
}
DBRX: Config = {
    "vocab_size": 61,
    "max_seq_len": 64,
    "d_model": 24,
    "n_heads": 4,
    "n_layers": 3,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.9, "rope_theta": 100.0},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 7, "moe_top_k": 3},
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA4 = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 14,
    "intermediate_size_mlp": 18,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 5,
    "attention_chunk_size": 5,
    "bos_token_id": None,
}
# A delta net's output is normalised. With random weights a query may be all but orthogonal to the
# keys, and a small epsilon then makes rounding errors large, whoever computes it.
QWEN3_NEXT = COMMON | {
    "rms_norm_eps": 1e-2,
    "hidden_size": 20,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 14,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}
HYBRID = GRANITE | {
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "shared_intermediate_size": 18,
    "mamba_n_heads": 4,
    "mamba_d_head": 10,
    "mamba_d_state": 7,
    "rms_norm_eps": 1e-2,
}
FULL, LINEAR, CONV = "full_attention", "linear_attention", "conv"
LFM2 = COMMON | {
    "hidden_size": 20,
    "intermediate_size": 18,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 4,
    "layer_types": [CONV, CONV, FULL, CONV],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_dense_layers": 1,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
KIMI_LINEAR = {
    k: v
    for k, v in LATENT.items()
    if k not in ("n_routed_experts", "q_lora_rank", "first_k_dense_replace")
} | {
    "rms_norm_eps": 1e-2,
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR],
    "linear_num_heads": 3,
    "linear_head_dim": 6,
    "num_experts": 12,
    "num_shared_experts": 1,
}
LONGCAT: Config = {
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "hidden_size": 20,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 18,
    "q_lora_rank": 11,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 5,
    "n_routed_experts": 3,
    "zero_expert_num": 4,
    "moe_topk": 4,
    "expert_ffn_hidden_size": 64,
    "routed_scaling_factor": 3.5,
    "eos_token_id": None,
    "bos_token_id": None,
}
DSA = LATENT | {
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "index_topk": 5,
    "index_head_dim": 12,
    "index_n_heads": 9,
    "head_dim": 8,
}

CONFIGURATIONS: dict[str, dict[str, Config]] = {
    "mixtral": {
        "gqa": MIXTRAL,
        "window": MIXTRAL | {"sliding_window": 5, "num_hidden_layers": 3, "rms_norm_eps": 1e-2},
        "tied-k1": MIXTRAL | {"tie_word_embeddings": True, "num_experts_per_tok": 1},
        "all-experts-gelu": MIXTRAL | {"num_experts_per_tok": 5, "hidden_act": "gelu"},
        "head-dim-linear": MIXTRAL | {"head_dim": 6, "rope_parameters": ROPE["linear"]},
        "dynamic": MIXTRAL
        | {"head_dim": 8, "max_position_embeddings": 6, "rope_parameters": ROPE["dynamic"]},
        "longrope-window": MIXTRAL
        | {"head_dim": 6, "sliding_window": 7, "rope_parameters": longrope(3)},
        "llama3": MIXTRAL | {"rope_parameters": ROPE["llama3"], "router_jitter_noise": 0.1},
    },
    "qwen2_moe": {
        "gated-shared": QWEN2 | {"norm_topk_prob": True},
        "window": QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        "layer-types": QWEN2
        | {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        "sparse-step-tied": QWEN2
        | {"decoder_sparse_step": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        "mlp-only": QWEN2 | {"mlp_only_layers": [0, 2], "hidden_act": "gelu_pytorch_tanh"},
        "no-bias-k1": QWEN2 | {"qkv_bias": False, "num_experts_per_tok": 1},
        "head-dim-yarn": QWEN2 | {"head_dim": 10, "rope_parameters": ROPE["yarn-mscale"]},
        "dynamic": QWEN2 | {"max_position_embeddings": 7, "rope_parameters": ROPE["dynamic"]},
        "all-dense": QWEN2 | {"num_experts": 0},
    },
    "qwen3_moe": {
        "wide-heads": QWEN3 | {"norm_topk_prob": True},
        "bias-raw-weights": QWEN3 | {"attention_bias": True, "rms_norm_eps": 1e-2},
        "window": QWEN3 | {"use_sliding_window": True, "sliding_window": 4, "norm_topk_prob": True},
        "sparse-step-tied": QWEN3 | {"decoder_sparse_step": 2, "tie_word_embeddings": True},
        "mlp-only-k1": QWEN3
        | {"mlp_only_layers": [1], "num_experts_per_tok": 1, "norm_topk_prob": True},
        "all-experts": QWEN3 | {"num_experts_per_tok": 7, "hidden_act": "relu"},
        "yarn": QWEN3 | {"rope_parameters": ROPE["yarn"]},
        "yarn-exact": QWEN3 | {"rope_parameters": ROPE["yarn-exact"]},
        "dynamic-window": QWEN3
        | {
            "max_position_embeddings": 9,
            "rope_parameters": ROPE["dynamic"],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
        "longrope": QWEN3 | {"rope_parameters": longrope(4, factor=3.0)},
    },
    "lfm2_moe": {
        "biased": LFM2,
        "no-bias-raw-weights-tied": LFM2
        | {
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "conv_L_cache": 4,
            "norm_eps": 1e-2,
        },
        "scaled-one-weight": LFM2
        | {
            "layer_types": [FULL, CONV, CONV],
            "num_hidden_layers": 3,
            "num_dense_layers": 0,
            "num_experts_per_tok": 1,
            "routed_scaling_factor": 1.7,
            "conv_L_cache": 1,
            "num_key_value_heads": 2,
        },
        "yarn": LFM2 | {"rope_parameters": ROPE["yarn"], "num_experts_per_tok": 6},
        "dynamic": LFM2 | {"max_position_embeddings": 9, "rope_parameters": ROPE["dynamic"]},
    },
    "qwen3_next": {
        "one-in-four": QWEN3_NEXT,
        "as-many-keys-tied": QWEN3_NEXT
        | {
            "num_hidden_layers": 3,
            "layer_types": [FULL, LINEAR, LINEAR],
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "tie_word_embeddings": True,
        },
        "bias-wide-conv": QWEN3_NEXT
        | {
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "attention_bias": True,
            "linear_conv_kernel_dim": 7,
            "linear_num_key_heads": 1,
            "rms_norm_eps": 1e-5,
        },
        "dense-between-raw-weights": QWEN3_NEXT
        | {
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, FULL, LINEAR],
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "hidden_act": "gelu",
        },
        "step-half-rotated-conv1": QWEN3_NEXT
        | {
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "decoder_sparse_step": 2,
            "linear_conv_kernel_dim": 1,
            "num_experts_per_tok": 1,
            "rope_parameters": ROPE["yarn"] | {"partial_rotary_factor": 0.5},
        },
        "dynamic": QWEN3_NEXT
        | {
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "max_position_embeddings": 9,
            "rope_parameters": ROPE["dynamic"] | {"partial_rotary_factor": 0.25},
        },
    },
    "qwen3_5_moe_text": {
        "one-in-four": QWEN3_NEXT,
        "full-first-tied": QWEN3_NEXT
        | {
            "num_hidden_layers": 3,
            "layer_types": [FULL, LINEAR, LINEAR],
            "linear_num_key_heads": 3,
            "linear_value_head_dim": 9,
            "tie_word_embeddings": True,
        },
        "bias-all-experts-yarn": QWEN3_NEXT
        | {
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "attention_bias": True,
            "num_experts_per_tok": 7,
            "linear_conv_kernel_dim": 2,
            "rope_parameters": ROPE["yarn"] | {"partial_rotary_factor": 1.0},
        },
    },
    "kimi_linear": {
        "one-in-four": KIMI_LINEAR,
        "groups-low-rank-bias": KIMI_LINEAR
        | {
            "num_hidden_layers": 2,
            "layer_types": [LINEAR, FULL],
            "q_lora_rank": 11,
            "attention_bias": True,
            "num_expert_group": 3,
            "topk_group": 2,
            "linear_conv_kernel_dim": 7,
            "rms_norm_eps": 1e-4,
        },
        "raw-weights-conv1-wide": KIMI_LINEAR
        | {
            "num_hidden_layers": 3,
            "layer_types": [FULL, LINEAR, LINEAR],
            "moe_renormalize": False,
            "linear_conv_kernel_dim": 1,
            "linear_num_heads": 1,
            "linear_head_dim": 17,
            "kv_lora_rank": 24,
            "v_head_dim": 19,
            "num_shared_experts": 3,
            "first_k_dense_replace": 0,
        },
        "dense-between-k1-gelu": KIMI_LINEAR
        | {
            "num_hidden_layers": 3,
            "layer_types": [LINEAR, FULL, LINEAR],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_experts_per_token": 1,
            "hidden_act": "gelu",
            "linear_conv_kernel_dim": 2,
            "routed_scaling_factor": 1.3,
        },
        "as-on-the-hub": {k: v for k, v in KIMI_LINEAR.items() if k != "layer_types"}
        | {
            "linear_attn_config": {
                "full_attn_layers": [2, 4],
                "kda_layers": [1, 3],
                "num_heads": 2,
                "head_dim": 5,
                "short_conv_kernel_size": 3,
            },
            "head_dim": 9,
            "first_k_dense_replace": 2,
            "num_nextn_predict_layers": 0,
            "moe_layer_freq": 1,
            "moe_router_activation_func": "sigmoid",
            "mla_use_nope": True,
            "rope_theta": 100.0,
            "rope_scaling": None,
        },
    },
    "olmoe": {
        "full-width-norm": OLMOE,
        "clip": OLMOE | {"clip_qkv": 0.9, "norm_topk_prob": True},
        "gqa-bias": OLMOE
        | {"num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-2},
        "mqa-bias-clip": OLMOE
        | {"num_key_value_heads": 1, "attention_bias": True, "clip_qkv": 1.1},
        "tied-all-experts": OLMOE | {"tie_word_embeddings": True, "num_experts_per_tok": 9},
        "k1-yarn": OLMOE | {"num_experts_per_tok": 1, "rope_parameters": ROPE["yarn"]},
        "longrope": OLMOE | {"rope_parameters": longrope(3, attention_factor=1.4)},
        "llama3": OLMOE | {"rope_parameters": ROPE["llama3"], "hidden_act": "gelu"},
    },
    "deepseek_v2": {
        "greedy": DEEPSEEK_V2,
        "lite-yarn": DEEPSEEK_V2
        | {"q_lora_rank": None, "rope_parameters": ROPE["yarn-mscale"], "norm_topk_prob": True},
        "groups": DEEPSEEK_V2
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.5,
        },
        "bias-tied": DEEPSEEK_V2
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
        },
        "k1-wide-values": DEEPSEEK_V2
        | {"num_experts_per_tok": 1, "v_head_dim": 17, "kv_lora_rank": 20, "q_lora_rank": None},
        "all-sparse-dynamic": DEEPSEEK_V2
        | {
            "first_k_dense_replace": 0,
            "max_position_embeddings": 6,
            "rope_parameters": ROPE["dynamic"],
        },
        "longrope-gelu": DEEPSEEK_V2
        | {
            "hidden_act": "gelu",
            "rope_parameters": longrope(4, factor=2.0, mscale_all_dim=1.0),
        },
        "linear-mscale": DEEPSEEK_V2
        | {"rope_parameters": ROPE["linear"] | {"mscale_all_dim": 0.8}, "n_shared_experts": 1},
    },
    "deepseek_v3": {
        "groups": DEEPSEEK_V3,
        "no-groups": DEEPSEEK_V3
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
        "half-rotated": DEEPSEEK_V3 | {"rope_interleave": False, "q_lora_rank": None},
        "yarn-bias": DEEPSEEK_V3
        | {"rope_parameters": ROPE["yarn-mscale-all"], "attention_bias": True},
        "tied-all-dense": DEEPSEEK_V3 | {"tie_word_embeddings": True, "first_k_dense_replace": 5},
        "k1-wide": DEEPSEEK_V3
        | {
            "num_experts_per_tok": 1,
            "n_group": 6,
            "topk_group": 1,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 3,
            "v_head_dim": 19,
            "rms_norm_eps": 1e-2,
        },
        "shared3-dynamic": DEEPSEEK_V3
        | {
            "n_shared_experts": 3,
            "max_position_embeddings": 6,
            "rope_parameters": ROPE["dynamic"],
            "hidden_act": "gelu",
        },
        "whole-groups-llama3": DEEPSEEK_V3
        | {"num_experts_per_tok": 8, "topk_group": 2, "rope_parameters": ROPE["llama3"]},
    },
    "glm4_moe": {
        "half-rotated": GLM4,
        "qk-norm-groups": GLM4
        | {"use_qk_norm": True, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
        "bias-odd-rotary": GLM4
        | {"attention_bias": True, "tie_word_embeddings": True}
        | partial_rotary(0.65),
        "wide-raw-weights": {k: v for k, v in GLM4.items() if k != "head_dim"}
        | {
            "hidden_size": 36,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-2,
        },
        "yarn-k1": GLM4
        | {"num_experts_per_tok": 1, "n_shared_experts": 2}
        | partial_rotary(0.75, ROPE["yarn"]),
    },
    "glm4_moe_lite": {
        "latent": GLM4_LITE,
        "listed-dense": GLM4_LITE
        | {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rope_interleave": False,
            "q_lora_rank": None,
        },
        "yarn-bias-groups": GLM4_LITE
        | {
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 3,
            "norm_topk_prob": False,
            "rope_parameters": ROPE["yarn-mscale-all"],
        },
    },
    "dots1": {
        "full": DOTS1,
        "window": DOTS1 | {"sliding_window": 4, "max_window_layers": 1, "num_key_value_heads": 6},
        "bias-raw-weights": DOTS1
        | {
            "attention_bias": True,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "n_shared_experts": 2,
            "rope_parameters": ROPE["linear"],
        },
        "groups-tied": DOTS1
        | {
            "n_group": 4,
            "topk_group": 2,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 6,
        },
    },
    "solar_open": {
        "plain": SOLAR,
        "bias-yarn": SOLAR
        | {"attention_bias": True, "n_shared_experts": 2, "rope_parameters": ROPE["yarn"]},
        "groups-scaled": SOLAR
        | {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7, "norm_topk_prob": False},
    },
    "exaone_moe": {
        "hybrid": EXAONE,
        "pattern-dense": EXAONE
        | {
            "sliding_window_pattern": 2,
            "first_k_dense_replace": 3,
            "num_shared_experts": 2,
            "rope_parameters": ROPE["llama3"],
        },
        "groups-no-norm": EXAONE
        | {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "num_hidden_layers": 4},
        "listed": EXAONE
        | {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "tie_word_embeddings": True,
        },
    },
    "hy_v3": {
        "plain": HY_V3,
        "biases": HY_V3
        | {"attention_bias": True, "mlp_bias": True, "num_shared_experts": 2, "rms_norm_eps": 1e-2},
        "listed-tied-k1": HY_V3
        | {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "enable_moe_fp32_combine": False,
            "router_scaling_factor": 0.7,
        },
        "yarn": HY_V3 | {"rope_parameters": ROPE["yarn-exact"]},
    },
    "mimo_v2_flash": {
        "released-rope": MIMO,
        "narrow-heads": MIMO
        | {
            "head_dim": 6,
            "v_head_dim": 10,
            "num_key_value_heads": 1,
            "layer_types": [*["sliding_attention"] * 2, "full_attention", "full_attention"],
            "attention_value_scale": None,
            "attention_bias": True,
            "n_group": 3,
            "topk_group": 2,
        }
        | ropes(0.7, 1.0),
        "yarn-tied-listed": MIMO
        | {
            "mlp_layer_types": ["sparse", "dense", "dense", "sparse"],
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.6,
        }
        | ropes(0.5, 0.9, ROPE["yarn"]),
        "all-slide": MIMO | {"layer_types": ["sliding_attention"] * 4, "sliding_window": 3},
    },
    "flex_olmo": {
        "post-norm": FLEX_OLMO,
        "mqa-bias-tied": FLEX_OLMO
        | {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-2,
        },
        "k1-yarn": FLEX_OLMO | {"num_experts_per_tok": 1, "rope_parameters": ROPE["yarn"]},
    },
    "granitemoe": {
        "multipliers": GRANITE,
        "bias-tied": GRANITE
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 5,
            "rope_parameters": ROPE["linear"],
        },
        # It has no shared experts, whatever the config says.
        "ones": MIXTRAL
        | {"num_experts_per_tok": 1, "hidden_act": "gelu", "shared_intermediate_size": 9},
    },
    "granitemoeshared": {
        "shared": GRANITE | {"shared_intermediate_size": 18},
        "none-shared": GRANITE | {"shared_intermediate_size": 0, "rms_norm_eps": 1e-2},
    },
    "granitemoehybrid": {
        "unrotated": HYBRID,
        "rotated-tied": HYBRID
        | {
            "num_hidden_layers": 3,
            "layer_types": ["attention", "mamba", "mamba"],
            "position_embedding_type": "rope",
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
        "bias-short-conv-chunks-of-3": HYBRID
        | {
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "attention_bias": True,
            "shared_intermediate_size": 0,
            "mamba_d_conv": 2,
            "mamba_chunk_size": 3,
            "mamba_n_heads": 8,
            "mamba_d_head": 5,
            "hidden_act": "gelu",
        },
    },
    "ernie4_5_moe": {
        "shared": ERNIE,
        "biases-interval": ERNIE
        | {
            "use_bias": True,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 2,
            "moe_num_shared_experts": 1,
            "tie_word_embeddings": False,
        },
        "none-shared-least-sum": ERNIE
        | {
            "moe_num_shared_experts": 0,
            "moe_norm_min": 0.5,
            "head_dim": 10,
            "rope_parameters": ROPE["yarn"],
        },
    },
    "hunyuan_v1_moe": {
        "norm-after": HUNYUAN,
        "alpha-topk-list": HUNYUAN
        | {
            "moe_topk": [1, 7, 2],
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10.0,
                "alpha": 5.0,
                "factor": 1.0,
            },
        },
        "tied-linear": HUNYUAN
        | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2, "rope_parameters": ROPE["linear"]},
    },
    "phimoe": {
        "close-experts": PHIMOE,
        "biases-window": PHIMOE
        | {
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 5,
            "router_jitter_noise": 0.01,
        },
        "longrope-tied": PHIMOE
        | {
            "tie_word_embeddings": True,
            "rope_parameters": longrope(5, short_mscale=1.2, long_mscale=1.2),
        },
        "longrope-two-scales": PHIMOE
        | {
            "head_dim": 6,
            "router_jitter_noise": 1.5,
            "rope_parameters": longrope(3, short_mscale=0.8, long_mscale=1.3),
        },
    },
    "minimax_m2": {
        "half-rotated": MINIMAX_M2 | partial_rotary(0.5),
        "whole-k1": MINIMAX_M2 | {"num_experts_per_tok": 1, "tie_word_embeddings": True},
        "yarn-mqa": MINIMAX_M2
        | {"num_key_value_heads": 1, "rms_norm_eps": 1e-2, "num_experts_per_tok": 4}
        | partial_rotary(0.75, ROPE["yarn"]),
    },
    "gpt_oss": {
        "windows-in-turn": GPT_OSS,
        "full-first": GPT_OSS
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 3,
            "rms_norm_eps": 1e-2,
        },
        "no-window-k1": GPT_OSS
        | {
            "layer_types": ["full_attention"] * 3,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
        "all-windows-all-experts": GPT_OSS
        | {
            "layer_types": ["sliding_attention"] * 3,
            "sliding_window": 7,
            "num_experts_per_tok": 5,
            "num_key_value_heads": 6,
            **SWIGLU_LIMIT,
        },
        "no-bias-tied": GPT_OSS
        | {"attention_bias": False, "tie_word_embeddings": True, "intermediate_size": 34},
        "wide-heads-linear": GPT_OSS | {"head_dim": 26, "rope_parameters": ROPE["linear"]},
        "dynamic": GPT_OSS | {"max_position_embeddings": 9, "rope_parameters": ROPE["dynamic"]},
        "released-rope": GPT_OSS
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    },
    "afmoe": {
        "gated": AFMOE,
        "bias-tied-no-mup": AFMOE
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "mup_enabled": False,
            "num_dense_layers": 2,
            "global_attn_every_n_layers": 2,
            "num_shared_experts": 1,
            "rms_norm_eps": 1e-2,
        },
        "k1-listed-yarn": AFMOE
        | {
            "num_experts_per_tok": 1,
            "num_dense_layers": 0,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": ROPE["yarn"],
        },
    },
    "longcat_flash": {
        "zero-experts": LONGCAT,
        "none-do-nothing": LONGCAT
        | {
            "zero_expert_num": 0,
            "moe_topk": 2,
            "num_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
            "rope_parameters": ROPE["yarn-mscale-all"],
        },
        "most-do-nothing-k9": LONGCAT
        | {
            "zero_expert_num": 9,
            "n_routed_experts": 2,
            "moe_topk": 9,
            "kv_lora_rank": 24,
            "expert_ffn_hidden_size": 10,
        },
    },
    "deepseek_v32": {
        "five-keys": DSA,
        "yarn-bias-listed": DSA
        | {
            "attention_bias": True,
            "rope_parameters": ROPE["yarn-mscale-all"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "index_topk": 3,
            "index_head_dim": 8,
        },
        "most-keys-tied": DSA
        | {
            "index_topk": 11,
            "tie_word_embeddings": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-2,
        },
    },
    "glm_moe_dsa": {
        "five-keys": DSA | {"n_group": 1, "topk_group": 1},
        "wide-bias": DSA
        | {
            "kv_lora_rank": 24,
            "attention_bias": True,
            "index_topk": 2,
            "index_head_dim": 20,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.7,
        },
    },
    "mellum": {
        "two-thetas": MELLUM,
        "yarn-bias-dense": MELLUM
        | {
            "attention_bias": True,
            "norm_topk_prob": False,
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
            "sliding_window": 3,
        }
        | ropes(1.0, 1.0, ROPE["yarn"]),
        "all-full-tied": MELLUM
        | {
            "layer_types": ["full_attention"] * 4,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 1,
        },
    },
    "cohere2_moe": {
        "sliding-softmax": COHERE2,
        "dense-first-sigmoid": COHERE2
        | {
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 18,
            "expert_selection_fn": "sigmoid",
            "num_shared_experts": 2,
            "tie_word_embeddings": False,
        },
        "rms-sum-raw-weights": COHERE2
        | {
            "rms_norm_eps": 1e-2,
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "sum",
            "sliding_window_pattern": 2,
            "attention_bias": True,
        },
        "dense-slides-yarn": COHERE2
        | {
            "first_k_dense_replace": 3,
            "prefix_dense_sliding_window_pattern": 2,
            "prefix_dense_intermediate_size": 10,
            "num_experts_per_tok": 1,
            "layer_norm_eps": 1e-2,
            "rope_parameters": ROPE["yarn"],
        },
    },
    "dbrx": {
        "clipped": DBRX,
        "raw-weights-gelu": DBRX
        | {
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 2.5, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 10,
                "moe_num_experts": 5,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": None,
                "ffn_act_fn": {"name": "gelu"},
            },
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "k1-yarn": DBRX
        | {
            "ffn_config": {"ffn_hidden_size": 14, "moe_num_experts": 4, "moe_top_k": 1},
            "rope_parameters": ROPE["yarn"],
        },
    },
    "llama4_text": {
        "chunks": LLAMA4,
        "tempered-dense-k2": LLAMA4
        | {
            "floor_scale": 3,
            "attn_scale": 0.7,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 4,
        },
        "listed-bias-tied": LLAMA4
        | {
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "moe_layers": [0, 1, 3],
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": [
                "full_attention",
                *["chunked_attention"] * 2,
                "full_attention",
            ],
            "attention_chunk_size": 3,
            "rms_norm_eps": 1e-2,
        },
        "all-experts-llama3": LLAMA4
        | {"num_experts_per_tok": 5, "attention_chunk_size": 64, "rope_parameters": ROPE["llama3"]},
    },
    "kimi_k2": {
        "one-group": DEEPSEEK_V3
        | {
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "num_nextn_predict_layers": 0,
            "rope_parameters": ROPE["yarn"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
}
"""`model_type` -> name -> what its transformers config is made from."""

QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 20,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
VISION: dict[str, Config] = {
    "kimi_k25": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "llama4": {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    },
    "qwen3_5_moe": QWEN_VISION,
    "qwen3_vl_moe": QWEN_VISION,
}
MULTIMODAL: dict[str, Config] = {
    "kimi_k25": DEEPSEEK_V3 | {"rope_parameters": ROPE["yarn-mscale-all"]},
    "llama4": LLAMA4,
    "qwen3_5_moe": QWEN3_NEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5}},
    "qwen3_vl_moe": QWEN3
    | {"moe_intermediate_size": 12, "rope_parameters": MROPE, "rms_norm_eps": 1e-3},
}
"""`model_type` of checkpoints whose text model runs -> its config."""

TRANSFORMERS_TYPE = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not know -> the type whose class it uses for them."""


def reference(model_type: str, config: Config, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model of a configuration in fp32, with exact attention and random weights."""
    config = transformers.AutoConfig.for_model(
        TRANSFORMERS_TYPE.get(model_type, model_type), **config
    )
    config.pad_token_id = 0
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights with which no norm is the identity, no bias small and no expert like another."""
    generator = torch.Generator().manual_seed(seed)
    biases = ("correction_bias", "expert_bias")
    buffers = ((name, x) for name, x in model.named_buffers() if name.endswith(biases))
    for name, x in (*model.named_parameters(), *buffers):
        noise = torch.randn(x.shape, generator=generator)
        if name.endswith("norm.weight"):
            x.copy_(1 + 0.3 * noise)
        elif name.endswith(biases):
            x.copy_(0.2 * noise)
        elif x.dim() == 1:
            x.copy_(0.5 * noise)
        elif "embed_tokens" in name:
            x.copy_(noise)
        else:
            x.copy_(noise * 1.5 / math.sqrt(x.shape[-1]))

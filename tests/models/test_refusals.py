"""What a config asks for and moezoo does not do is refused, naming the field."""

from typing import Any

import pytest
import torch
import transformers
from configurations import (
    CONFIGURATIONS,
    MULTIMODAL,
    QWEN2,
    TRANSFORMERS_TYPE,
    longrope,
    partial_rotary,
)

from moezoo.errors import UnsupportedArchitectureError
from moezoo.registry import architecture, build, list_architectures

BASE = {model_type: next(iter(cases.values())) for model_type, cases in CONFIGURATIONS.items()}
"""The first of each architecture's configurations."""
BASE["kimi_k2"] = BASE["deepseek_v3"]
PARTIAL_ROTARY = {"glm4_moe", "minimax_m2", "qwen3_next", "qwen3_5_moe_text"}

REFUSED_BY_TRANSFORMERS = {
    ("mellum", "num_hidden_layers"),
    ("mimo_v2_flash", "num_hidden_layers"),
    ("lfm2_moe", "num_hidden_layers"),
    ("kimi_linear", "num_hidden_layers"),
    ("granitemoehybrid", "num_hidden_layers"),
    ("granitemoehybrid", "hidden_size"),
}

EVERYWHERE: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "mish"},
    "output_router_logits": {"output_router_logits": True},
    "vocab_size": {"vocab_size": -1},
    "hidden_size": {"hidden_size": 0},
    "num_hidden_layers": {"num_hidden_layers": 0},
}
ROPE: dict[str, dict[str, Any]] = {
    "axial": {"rope_type": "axial"},
    "unknown": {"rope_type": "spiral", "factor": 2.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "partial-longrope": longrope(2, partial_rotary_factor=0.5),
    "word-yarn": {"rope_type": "yarn", "factor": "big", "original_max_position_embeddings": 24},
    "word-linear": {"rope_type": "linear", "factor": "big"},
    "no-factor": {"rope_type": "dynamic", "factor": None},
    "zero-factor": {"rope_type": "linear", "factor": 0.0},
    "short-longrope": longrope(2) | {"long_factor": [1.0]},
}
FIELDS = [
    ("mixtral", "sliding_window", {"sliding_window": 0}),
    ("mixtral", "layer_types", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2_moe", "layer_types", {"layer_types": ["chunked_attention"] * 3}),
    ("qwen2_moe", "sliding_window", {"layer_types": ["sliding_attention"] * 3}),
    ("qwen2_moe", "layer_types", {"use_sliding_window": True, "sliding_window": None}),
    (
        "qwen3_moe",
        "layer_types",
        {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
    ("lfm2_moe", "layer_types", {"layer_types": ["conv"] * 4}),
    ("lfm2_moe", "layer_types", {"layer_types": None}),
    ("lfm2_moe", "layer_types", {"layer_types": ["conv", "linear_attention"] * 2}),
    ("granitemoehybrid", "layer_types", {"layer_types": ["linear_attention"] * 4}),
    ("granitemoehybrid", "mamba_proj_bias", {"mamba_proj_bias": True}),
    ("granitemoehybrid", "mamba_n_groups", {"mamba_n_groups": 2}),
    ("granitemoehybrid", "mamba_d_state", {"mamba_d_state": 0}),
    ("granitemoehybrid", "time_step_limit", {"time_step_limit": (0.1, 2.0)}),
    ("granitemoehybrid", "num_local_experts", {"num_local_experts": 0}),
    ("lfm2_moe", "conv_bias", {"conv_bias": True}),
    ("lfm2_moe", "conv_L_cache", {"conv_L_cache": 0}),
    ("lfm2_moe", "num_experts_per_tok", {"num_experts_per_tok": 8}),
    ("lfm2_moe", "num_dense_layers", {"num_dense_layers": -1}),
    ("qwen3_next", "layer_types", {"layer_types": ["linear_attention"] * 4}),
    ("qwen3_next", "layer_types", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("qwen3_next", "linear_num_value_heads", {"linear_num_value_heads": 5}),
    ("qwen3_next", "linear_conv_kernel_dim", {"linear_conv_kernel_dim": 0}),
    ("qwen3_5_moe_text", "layer_types", {"layer_types": ["sliding_attention"] * 4}),
    ("qwen3_5_moe_text", "linear_key_head_dim", {"linear_key_head_dim": 0}),
    ("qwen3_5_moe_text", "num_experts_per_tok", {"num_experts_per_tok": 8}),
    ("kimi_linear", "layer_types", {"layer_types": ["linear_attention"] * 4}),
    ("kimi_linear", "layer_types", {"layer_types": ["full_attention", "conv"] * 2}),
    ("kimi_linear", "linear_head_dim", {"linear_head_dim": 0}),
    ("kimi_linear", "linear_num_heads", {"linear_num_heads": 0}),
    ("kimi_linear", "linear_conv_kernel_dim", {"linear_conv_kernel_dim": 0}),
    (
        "kimi_linear",
        "first_k_dense_replace",
        {"mlp_layer_types": ["sparse"] * 4} | {"first_k_dense_replace": 1},
    ),
    ("kimi_linear", "mla_use_nope", {"mla_use_nope": False}),
    ("kimi_linear", "moe_layer_freq", {"moe_layer_freq": 2}),
    ("kimi_linear", "moe_router_activation_func", {"moe_router_activation_func": "softmax"}),
    ("kimi_linear", "num_key_value_heads", {"num_key_value_heads": 2}),
    ("kimi_linear", "n_group", {"num_expert_group": 5}),
    ("kimi_linear", "qk_rope_head_dim", {"qk_rope_head_dim": 5}),
    ("kimi_linear", "tie_word_embeddings", {"tie_word_embeddings": True}),
    ("olmoe", "sliding_window", {"sliding_window": 4}),
    ("olmoe", "head_dim", {"head_dim": 8}),
    ("deepseek_v2", "sliding_window", {"sliding_window": 4}),
    ("deepseek_v2", "topk_method", {"topk_method": "noaux_tc"}),
    ("deepseek_v2", "scoring_func", {"scoring_func": "sigmoid"}),
    ("deepseek_v2", "moe_layer_freq", {"moe_layer_freq": 2}),
    ("deepseek_v2", "num_key_value_heads", {"num_key_value_heads": 2}),
    ("deepseek_v2", "num_experts_per_tok", {"num_experts_per_tok": None}),
    ("mixtral", "num_experts_per_tok", {"num_experts_per_tok": 99}),
    ("mixtral", "num_experts_per_tok", {"num_experts_per_tok": -1}),
    ("mixtral", "num_attention_heads", {"num_attention_heads": 0}),
    ("mixtral", "num_attention_heads", {"num_attention_heads": 21}),
    ("mixtral", "num_key_value_heads", {"num_key_value_heads": 3}),
    ("qwen3_moe", "num_key_value_heads", {"num_key_value_heads": 0}),
    ("qwen3_moe", "moe_intermediate_size", {"moe_intermediate_size": 0}),
    ("qwen2_moe", "num_experts", {"num_experts": -1}),
    ("deepseek_v3", "v_head_dim", {"v_head_dim": None}),
    ("deepseek_v3", "q_lora_rank", {"q_lora_rank": -3}),
    ("qwen2_moe", "num_experts_per_tok", {"num_experts_per_tok": 99}),
    ("qwen3_moe", "num_experts_per_tok", {"num_experts_per_tok": 99}),
    ("olmoe", "num_experts_per_tok", {"num_experts_per_tok": 0}),
    ("deepseek_v2", "n_group", {"topk_method": "group_limited_greedy"}),
    ("deepseek_v2", "n_group", {"topk_method": "group_limited_greedy", "n_group": 5}),
    (
        "deepseek_v2",
        "topk_group",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5},
    ),
    ("deepseek_v3", "sliding_window", {"sliding_window": 4}),
    ("dots1", "scoring_func", {"scoring_func": "softmax"}),
    ("dots1", "moe_layer_freq", {"moe_layer_freq": 2}),
    ("dots1", "n_group", {"n_group": 5}),
    ("ernie4_5_moe", "moe_layer_interval", {"moe_layer_interval": 0}),
    ("ernie4_5_moe", "moe_num_shared_experts", {"moe_num_shared_experts": -1}),
    ("dots1", "n_routed_experts", {"n_routed_experts": 0}),
    ("ernie4_5_moe", "tie_word_embeddings", {"use_bias": True}),
    ("flex_olmo", "num_experts_per_tok", {"num_experts_per_tok": 8}),
    ("granitemoe", "logits_scaling", {"logits_scaling": None}),
    ("granitemoe", "logits_scaling", {"logits_scaling": 0}),
    ("granitemoeshared", "num_experts_per_tok", {"num_experts_per_tok": 0}),
    ("exaone_moe", "layer_types", {"layer_types": ["chunked_attention"] * 5}),
    ("exaone_moe", "num_shared_experts", {"num_shared_experts": -1}),
    ("glm4_moe", "n_group", {"n_group": 12, "topk_group": 12}),
    ("glm4_moe", "num_experts_per_tok", {"num_experts_per_tok": 13}),
    ("glm4_moe", "sliding_window", {"sliding_window": 4}),
    ("glm4_moe", "rope_parameters", partial_rotary(1.5)),
    ("glm4_moe", "rope_parameters", partial_rotary(0.1)),
    ("glm4_moe_lite", "mlp_layer_types", {"mlp_layer_types": ["dense", "mixed", "sparse"]}),
    ("glm4_moe_lite", "mlp_layer_types", {"mlp_layer_types": ["dense", "sparse"]}),
    ("glm4_moe_lite", "rope_parameters", partial_rotary(0.5)),
    ("glm4_moe_lite", "topk_method", {"topk_method": "greedy"}),
    ("hunyuan_v1_moe", "moe_topk", {"moe_topk": [1, 8, 2]}),
    ("hunyuan_v1_moe", "moe_topk", {"moe_topk": [1, 2]}),
    ("hunyuan_v1_moe", "moe_intermediate_size", {"moe_intermediate_size": [14, 14, 10]}),
    ("hunyuan_v1_moe", "num_shared_expert", {"num_shared_expert": [1, 2, 1]}),
    ("hunyuan_v1_moe", "use_cla", {"use_cla": True}),
    ("phimoe", "num_experts_per_tok", {"num_experts_per_tok": 3}),
    ("phimoe", "num_experts_per_tok", {"num_local_experts": 1}),
    ("phimoe", "tie_word_embeddings", {"lm_head_bias": True, "tie_word_embeddings": True}),
    ("glm4_moe_lite", "first_k_dense_replace", {"first_k_dense_replace": 2}),
    ("exaone_moe", "is_moe_layer", {"is_moe_layer": [True] * 5}),
    ("hy_v3", "first_k_dense_replace", {"first_k_dense_replace": 0}),
    ("hy_v3", "route_norm", {"route_norm": False}),
    ("hy_v3", "num_shared_experts", {"num_shared_experts": None}),
    ("hy_v3", "num_experts_per_tok", {"num_experts_per_tok": 10}),
    ("mimo_v2_flash", "n_shared_experts", {"n_shared_experts": 1}),
    ("mimo_v2_flash", "num_key_value_heads", {"num_key_value_heads": 8}),
    ("mimo_v2_flash", "rope_theta", {"rope_theta": 640000.0}),
    ("mimo_v2_flash", "hybrid_layer_pattern", {"hybrid_layer_pattern": [0, 1, 0, 1]}),
    ("mimo_v2_flash", "swa_num_key_value_heads", {"swa_num_key_value_heads": 2}),
    ("mimo_v2_flash", "moe_layer_freq", {"moe_layer_freq": [1, 1, 1, 1]}),
    ("mimo_v2_flash", "layernorm_epsilon", {"layernorm_epsilon": 0.5}),
    ("minimax_m2", "attn_type_list", {"attn_type_list": [1, 0]}),
    ("minimax_m2", "scoring_func", {"scoring_func": "softmax"}),
    ("minimax_m2", "qk_norm_type", {"qk_norm_type": "per_head"}),
    ("minimax_m2", "shared_intermediate_size", {"shared_intermediate_size": 4}),
    ("solar_open", "first_k_dense_replace", {"first_k_dense_replace": 1}),
    ("afmoe", "num_experts_per_tok", {"num_experts_per_tok": 10}),
    ("afmoe", "score_func", {"score_func": "softmax"}),
    ("afmoe", "layer_types", {"layer_types": ["chunked_attention"] * 5}),
    ("dbrx", "num_attention_heads", {"num_attention_heads": 10}),
    ("deepseek_v32", "index_head_dim", {"index_head_dim": 6}),
    ("deepseek_v32", "index_topk", {"index_topk": 0}),
    ("deepseek_v32", "layer_types", {"layer_types": ["full_attention"] * 3}),
    ("deepseek_v32", "mlp_bias", {"mlp_bias": True}),
    ("glm_moe_dsa", "indexer_types", {"indexer_types": ["full", "shared", "full"]}),
    ("glm_moe_dsa", "n_group", {"n_group": 5}),
    ("longcat_flash", "zero_expert_num", {"zero_expert_num": -1}),
    ("longcat_flash", "zero_expert_type", {"zero_expert_type": "copy"}),
    ("longcat_flash", "mla_scale_q_lora", {"mla_scale_q_lora": False}),
    ("longcat_flash", "num_experts_per_tok", {"num_experts_per_tok": 12}),
    ("longcat_flash", "router_bias", {"router_bias": True}),
    ("longcat_flash", "qk_head_dim", {"qk_head_dim": 20}),
    ("llama4_text", "attention_chunk_size", {"attention_chunk_size": None}),
    ("llama4_text", "floor_scale", {"floor_scale": 0}),
    (
        "llama4_text",
        "no_rope_layers",
        {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 4},
    ),
    ("llama4_text", "num_experts_per_tok", {"num_experts_per_tok": 6}),
    ("llama4_text", "layer_types", {"layer_types": ["sliding_attention"] * 4}),
    ("mellum", "num_experts_per_tok", {"num_experts_per_tok": 8}),
    (
        "mellum",
        "rope_parameters",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}},
    ),
    ("cohere2_moe", "expert_selection_fn", {"expert_selection_fn": "tanh"}),
    ("cohere2_moe", "num_shared_experts", {"num_shared_experts": -1}),
    (
        "cohere2_moe",
        "shared_expert_combination_strategy",
        {"shared_expert_combination_strategy": "max"},
    ),
    ("cohere2_moe", "prefix_dense_intermediate_size", {"first_k_dense_replace": 1}),
    ("solar_open", "use_qk_norm", {"use_qk_norm": True}),
    ("deepseek_v3", "topk_method", {"topk_method": "greedy"}),
    ("deepseek_v3", "scoring_func", {"scoring_func": "softmax"}),
    ("deepseek_v3", "moe_layer_freq", {"moe_layer_freq": 2}),
    ("deepseek_v3", "num_key_value_heads", {"num_key_value_heads": 128}),
    ("deepseek_v3", "n_group", {"n_group": 5}),
    ("deepseek_v3", "n_group", {"n_group": None}),
    ("deepseek_v3", "topk_group", {"topk_group": 4}),
    ("deepseek_v3", "topk_group", {"topk_group": -1}),
    ("deepseek_v3", "head_dim", {"head_dim": 16}),
    ("gpt_oss", "hidden_act", {"hidden_act": "gelu"}),
    ("gpt_oss", "swiglu_alpha", {"swiglu_alpha": 1.0}),
    ("gpt_oss", "swiglu_limit", {"swiglu_limit": 0.0}),
    ("gpt_oss", "layer_types", {"layer_types": ["chunked_attention"] * 3}),
    ("gpt_oss", "layer_types", {"sliding_window": None}),
    ("gpt_oss", "sliding_window", {"sliding_window": 0}),
    ("gpt_oss", "num_experts_per_tok", {"num_experts_per_tok": 6}),
    ("gpt_oss", "num_local_experts", {"num_local_experts": 0}),
    (
        "deepseek_v3",
        "rope_parameters",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 10.0,
                "factor": 2.0,
                "mscale_all_dim": "big",
            }
        },
    ),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ffn_act_fn", {"name": "mish"}),
        ("moe_normalize_expert_weights", 2.0),
        ("moe_top_k", 8),
        ("ffn_hidden_size", 0),
    ],
)
def test_field_of_dbrx_experts(field: str, value: Any) -> None:
    message = refusal("dbrx", ffn_config=BASE["dbrx"]["ffn_config"] | {field: value})
    assert field in message and str(value) in message


def refusal(model_type: str, **changes: Any) -> str:
    config = transformers.AutoConfig.for_model(
        TRANSFORMERS_TYPE.get(model_type, model_type), **BASE[model_type] | changes
    )
    with torch.device("meta"), pytest.raises(UnsupportedArchitectureError) as error:
        build(config)
    return str(error.value)


def test_every_architecture_is_here() -> None:
    assert {*BASE, *MULTIMODAL} == set(list_architectures())


@pytest.mark.parametrize("field", EVERYWHERE)
@pytest.mark.parametrize("model_type", BASE)
def test_everywhere(model_type: str, field: str) -> None:
    if (model_type, field) in REFUSED_BY_TRANSFORMERS:
        pytest.skip("transformers refuses it")
    if (model_type, field) == ("hy_v3", "output_router_logits"):
        pytest.skip("its release has it")
    message = refusal(model_type, **EVERYWHERE[field])
    assert field in message
    assert str(EVERYWHERE[field][field]) in message


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("model_type", BASE)
def test_rope(model_type: str, rope: str) -> None:
    if model_type in PARTIAL_ROTARY and rope in ("partial", "partial-longrope"):
        pytest.skip("is done")
    # transformers' own check of a longrope needs to know the head's width.
    width = {"head_dim": 10} if model_type == "mixtral" else {}
    mscales = {"short_mscale": 1.0, "long_mscale": 1.0} if model_type == "phimoe" else {}
    parameters = ROPE[rope] | {"rope_theta": 10.0} | mscales
    message = refusal(model_type, **width, rope_parameters=parameters)
    assert "rope_parameters" in message
    assert str(ROPE[rope]["rope_type"]) in message


def test_rope_for_each_kind_of_layer() -> None:
    config = transformers.AutoConfig.for_model("qwen2_moe", **QWEN2)
    config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 10.0}}
    with torch.device("meta"), pytest.raises(UnsupportedArchitectureError, match="rope_parameters"):
        build(config)


@pytest.mark.parametrize(("model_type", "field", "changes"), FIELDS)
def test_field(model_type: str, field: str, changes: dict[str, Any]) -> None:
    message = refusal(model_type, **changes)
    assert model_type in message
    assert field in message
    assert str(changes.get(field)) in message or field not in changes


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_sparse_step_of_zero(model_type: str) -> None:
    assert "decoder_sparse_step is 0" in refusal(model_type, decoder_sparse_step=0)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_more_experts_a_token_than_there_are(model_type: str) -> None:
    assert "num_experts_per_tok" in refusal(model_type, num_experts_per_tok=20)


def test_unknown_model_type() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'gpt_neox' is not supported") as error:
        architecture("gpt_neox")
    assert all(model_type in str(error.value) for model_type in list_architectures())
    assert 'AutoModelForCausalLM.from_pretrained(..., experts_implementation="moezoo")' in str(
        error.value
    )


def test_what_has_no_effect_is_no_reason_to_refuse() -> None:
    """Fields of real configs that only matter in training, or name what is done anyway."""
    harmless = {
        "aux_loss_alpha": 0.001,
        "attention_dropout": 0.1,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "ep_size": 1,
        "initializer_range": 0.5,
        "max_window_layers": 1,
        "moe_layer_freq": 1,
        "pretraining_tp": 2,
        "router_aux_loss_coef": 0.5,
        "router_jitter_noise": 0.3,
        "seq_aux": True,
    }
    for model_type, base in BASE.items():
        kind = TRANSFORMERS_TYPE.get(model_type, model_type)
        with torch.device("meta"):
            build(transformers.AutoConfig.for_model(kind, **base | harmless))

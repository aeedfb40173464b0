"""Reports checked against published figures, hand-counted formats and transformers' own modules."""

import json
import shutil
from io import StringIO

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moezoo.assets import tiny_model
from moezoo.errors import CheckpointError
from moezoo.loaders.checkpoint import Checkpoint
from moezoo.loaders.load import from_pretrained
from moezoo.tools.inspect import EXPERTS_AS, inspect, matrix_bytes

# The configs of released models, as far as they decide shapes.
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "torch_dtype": "bfloat16",
}
"""The published count of active parameters leaves out the embedding."""


@pytest.fixture
def folder(tmp_path):
    """A copy of the package's checkpoint to break."""
    return shutil.copytree(tiny_model(), tmp_path / "model")


def config_only(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_model_in_the_package():
    report = inspect(tiny_model())
    reference = AutoModelForCausalLM.from_pretrained(tiny_model())
    assert report.supported
    assert report.reason is None
    assert report.model_type == "qwen3_moe"
    assert report.architecture == "Qwen3MoeForCausalLM"
    assert report.parameters == reference.num_parameters()
    assert report.checkpoint_dtypes == {"bfloat16": 2 * report.parameters}
    assert report.checkpoint_files == 1
    assert (report.num_layers, report.num_moe_layers) == (6, 6)
    experts = report.experts
    assert (experts.num_experts, experts.per_token, experts.intermediate_size) == (16, 4, 64)
    assert experts.router == "softmax_topk(renormalize=True)"
    assert report.expert_bytes_on_disk == 6 * 16 * 3 * 64 * 256 * 2
    assert report.active_parameters == report.parameters - 6 * 12 * 3 * 64 * 256
    assert report.kv_cache_bytes_per_token == 6 * 2 * 2 * 64 * 2
    assert report.context_length == 512


@pytest.mark.parametrize(
    ("config", "total", "active", "kv_bytes"),
    [
        (MIXTRAL_8X7B, 46.7e9, 12.9e9, 32 * 2 * 8 * 128 * 2),
        (QWEN3_30B_A3B, 30.5e9, 3.35e9, 48 * 2 * 4 * 128 * 2),
        (DEEPSEEK_V3, 671.0e9, 37.6e9, 61 * (512 + 64) * 2),
        (GPT_OSS_20B, 20.91e9, 3.61e9 + 201088 * 2880, 24 * 2 * 8 * 64 * 2),
    ],
    ids=["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"],
)
def test_published_sizes_follow_from_the_config(tmp_path, config, total, active, kv_bytes):
    report = inspect(config_only(tmp_path, **config))
    assert report.parameters == pytest.approx(total, rel=2e-3)
    assert report.active_parameters == pytest.approx(active, rel=5e-3)
    assert report.kv_cache_bytes_per_token == kv_bytes
    assert report.dtype == "bfloat16"
    assert report.weight_bytes["bf16"][1] == pytest.approx(2 * report.parameters, rel=1e-3)
    assert not report.supported
    assert "has neither model.safetensors nor model.safetensors.index.json" in report.reason


def test_states_are_counted(tmp_path):
    """Of Qwen3-Next-80B-A3B: 12 layers of 48 have keys and values, the others a state."""
    report = inspect(config_only(tmp_path, model_type="qwen3_next", torch_dtype="bfloat16"))
    assert report.parameters == pytest.approx(80e9, rel=5e-3)
    assert report.kv_cache_bytes_per_token == 12 * 2 * 2 * 256 * 2
    assert report.state_bytes_per_sequence == 36 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)
    shown = StringIO()
    Console(file=shown, width=100).print(report)
    assert "77,856,768 bytes per sequence" in shown.getvalue()


def test_states_beside_latents_are_counted(tmp_path):
    """Of Kimi-Linear-48B-A3B: 7 layers of 27 have latents, the others a state."""
    full = [4, 8, 12, 16, 20, 24, 27]
    layers = {
        "full_attn_layers": full,
        "kda_layers": [layer for layer in range(1, 28) if layer not in full],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    }
    config = {"model_type": "kimi_linear", "linear_attn_config": layers, "head_dim": 72}
    report = inspect(config_only(tmp_path, torch_dtype="bfloat16", **config))
    assert report.parameters == pytest.approx(49e9, rel=1e-2)
    assert report.kv_cache_bytes_per_token == 7 * (512 + 64) * 2
    assert report.state_bytes_per_sequence == 20 * (32 * 128 * 128 * 4 + 3 * 4096 * 4 * 2)


def test_a_rank_holds_its_share_of_the_experts_and_all_the_rest(tmp_path):
    report = inspect(config_only(tmp_path, **QWEN3_30B_A3B))
    per_rank = report.weight_bytes["bf16"]
    assert list(per_rank) == [1, 2, 4, 8, 16, 32, 64]
    experts = 48 * 128 * 3 * 768 * 2048 * 2
    assert per_rank[1] - per_rank[8] == experts * 7 // 8
    # 6 experts on 4 ranks: the fullest rank holds 2
    odd = inspect(config_only(tmp_path, **(MIXTRAL_8X7B | {"num_local_experts": 6})))
    per_rank = odd.weight_bytes["bf16"]
    assert list(per_rank) == [1, 2, 4]
    assert per_rank[1] - per_rank[4] == 4 * 32 * 3 * 14336 * 4096 * 2


@pytest.mark.parametrize(
    ("name", "rows", "columns", "nbytes"),
    [
        ("bf16", 96, 160, 96 * 160 * 2),
        ("fp8_w8a8", 256, 512, 256 * 512 + 2 * 4 * 4),
        ("fp8_w8a8", 96, 160, 96 * 160 + 1 * 2 * 4),
        ("int8_w8a16", 96, 160, 96 * 160 + 96 * 2),
        ("int4_w4a16", 96, 256, 96 * 128 + 96 * 2 * 2),
        ("int4_w4a16", 96, 160, 96 * 80 + 96 * 5 * 2),
        ("int4_w4a16", 96, 150, None),
        ("mxfp4", 96, 160, 96 * 80 + 96 * 5),
        ("mxfp4", 96, 150, None),
    ],
)
def test_bytes_of_a_matrix_in_each_format(name, rows, columns, nbytes):
    assert matrix_bytes(name, rows, columns) == nbytes


def test_formats_that_do_not_fit_are_left_out(tmp_path):
    report = inspect(config_only(tmp_path, **(MIXTRAL_8X7B | {"intermediate_size": 1000})))
    assert set(report.weight_bytes) == {"bf16", "fp8_w8a8", "int8_w8a16"}


def test_no_weight_is_read(monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("inspect reads headers only")

    monkeypatch.setattr(Checkpoint, "fetch", fetch)
    assert inspect(tiny_model()).supported


def test_a_head_beside_a_tied_embedding_is_no_obstacle(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert inspect(folder).supported
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    assert inspect(folder).supported


def test_layers_that_the_config_does_not_count_are_reported_unless_they_predict(tmp_path):
    """As loading does: layer 3 is multi-token prediction, layer 2 of three is not."""
    reference("deepseek_v3", CONFIGURATIONS["deepseek_v3"]["groups"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [*weights]:
        if name.startswith("model.layers.2."):
            weights[name.replace(".2.", ".3.", 1)] = weights[name].clone()
    weights["model.layers.3.eh_proj.weight"] = torch.zeros(20, 40)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert inspect(tmp_path).supported
    from_pretrained(tmp_path, device="cpu", progress=False)
    set_config(tmp_path, num_hidden_layers=2)
    report = inspect(tmp_path)
    assert not report.supported
    assert "model.layers.2.input_layernorm.weight" in report.reason
    assert "model.layers.3" not in report.reason
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path, device="cpu", progress=False)
    assert str(caught.value) == report.reason


def test_an_unknown_model_type_is_reported_from_its_headers(folder):
    set_config(folder, model_type="gpt2")
    report = inspect(folder)
    assert not report.supported
    assert "'gpt2' is not supported" in report.reason
    assert report.expert_bytes_on_disk == 6 * 16 * 3 * 64 * 256 * 2
    assert report.parameters is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "sigmoid_of_doom"}, "hidden_act is 'sigmoid_of_doom'"),
        ({"quantization_config": {"quant_method": "quark"}}, "'quark'"),
        ({"moe_intermediate_size": 32}, "experts"),
        ({"num_experts": 17}, "expert 16"),
    ],
)
def test_what_moezoo_cannot_load_is_reported_with_the_reason(folder, changes, reason):
    set_config(folder, **changes)
    report = inspect(folder)
    assert not report.supported
    assert reason in report.reason
    assert report.checkpoint_bytes > 0


@pytest.mark.parametrize("text", ["{bad", '{"max_new_tokens": -3}'])
def test_a_generation_config_that_loading_refuses_is_the_reason(folder, text):
    (folder / "generation_config.json").write_text(text)
    report = inspect(folder)
    assert not report.supported
    assert f"{folder}: generation_config.json is not valid: " in report.reason
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder, device="cpu", progress=False)
    assert str(caught.value) == report.reason


def test_quantised_models_are_measured_all_the_same(folder):
    plain = inspect(folder)
    set_config(folder, quantization_config={"quant_method": "fp8"})
    report = inspect(folder)
    assert (report.parameters, report.experts) == (plain.parameters, plain.experts)


def test_unreadable_weights_leave_the_config_to_report(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    report = inspect(folder)
    assert not report.supported
    assert "truncated" in report.reason
    assert report.parameters == inspect(tiny_model()).parameters
    weights.rename(folder / "pytorch_model.bin")
    report = inspect(folder)
    assert "only pickled weights (pytorch_model.bin)" in report.reason
    assert report.checkpoint_files == 0


def test_where_there_is_no_config_there_is_no_report(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect(tmp_path)


def test_the_table_tells_what_the_report_holds():
    console = Console(width=100, file=StringIO())
    console.print(inspect(tiny_model()))
    text = console.file.getvalue()
    for words in ("qwen3_moe", "6,975,488, 3,436,544 active", "4 of 16", "3,072 bytes per token"):
        assert words in text
    for name in EXPERTS_AS:
        assert name in text
    assert AutoConfig.from_pretrained(tiny_model()).architectures[0] in text


@pytest.mark.parametrize(
    "config", [QWEN3_30B_A3B, DEEPSEEK_V3], ids=["qwen3-30b-a3b", "deepseek-v3"]
)
def test_the_table_fits_a_terminal(tmp_path, config):
    """80 columns hold the names of the formats and every number whole, up to 64 GPUs."""
    console = Console(width=80, file=StringIO())
    report = inspect(config_only(tmp_path, **config))
    console.print(report)
    text = console.file.getvalue()
    assert "…" not in text
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row and row[0] in EXPERTS_AS}
    assert tuple(table) == EXPERTS_AS
    assert "GB of weights per GPU" in text
    for name, per_rank in report.weight_bytes.items():
        shown = [float(number) for number in table[name]]
        assert shown == pytest.approx([nbytes / 1e9 for nbytes in per_rank.values()], rel=5e-3)

"""What every architecture does beside computing logits: one test for each feature."""

import zlib
from pathlib import Path

import pytest
import torch
from configurations import CONFIGURATIONS, reference
from safetensors.torch import load_file, save_file
from test_oracle import assert_close, idle_experts, load, padded, token_ids, write
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moezoo
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine, supports
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import QuantizedWeights

EXACT = ["int8_w8a16", "int4_w4a16", "mxfp4"]
"""Formats with which only the weights are rounded: one for each architecture, by its name, so that
a new one changes no other's."""
QUANTIZED = [(name, EXACT[zlib.crc32(name.encode()) % 3]) for name in CONFIGURATIONS]
QUANTIZED += [(name, "fp8_w8a8") for name in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cases = CONFIGURATIONS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    write(request.param, reference(request.param, next(iter(cases.values()))), path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load(folder)


def moe_layers(model: PreTrainedModel) -> dict[int, FusedMoE]:
    layers = enumerate(model.decoder.layers)
    return {index: layer.mlp for index, layer in layers if isinstance(layer.mlp, FusedMoE)}


def test_generates_on_the_engine(model: PreTrainedModel) -> None:
    assert supports(model.decoder)
    prompts = [row[row > 0].tolist() for row in padded("left")["input_ids"]]
    results = model.generate(**padded("left"), max_new_tokens=4, do_sample=False)
    for prompt, row in zip(prompts, results, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        assert row[-4:].tolist() == alone[0, len(prompt) :].tolist()


def test_pages_hold_what_a_cache_does(model: PreTrainedModel) -> None:
    """Prompts in chunks of 7 tokens, rows that follow one another, beyond every window."""
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (5, 1, 31, 18)]
    engine = Engine(model.decoder, num_rows=3, context=64, chunk=7)
    requests = iter([Request(i, ids, 6) for i, ids in enumerate(prompts)])
    finished = {r.index: r.tokens for r in Batcher(engine, engine.greedy, ends=set()).run(requests)}
    for i, ids in enumerate(prompts):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        assert finished[i] == alone[0, len(ids) :].tolist()


def test_routing_is_recorded(model: PreTrainedModel) -> None:
    inputs = padded("left")
    tokens = int(inputs["attention_mask"].sum())
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        model(**inputs)
    layers = moe_layers(model)
    assert trace.layers == tuple(layers)
    for row, moe in enumerate(layers.values()):
        ids = trace.topk_ids[row]
        assert ids.shape[0] == tokens
        assert trace.expert_load[row].tolist() == (
            ids.flatten().bincount(minlength=len(moe.gate)).tolist()
        )


def write_wide(model_type: str, path: Path) -> Path:
    """Of sizes that every format takes."""
    config = next(iter(CONFIGURATIONS[model_type].values()))
    sizes = ("hidden_size", "d_model", "intermediate_size", "moe_intermediate_size")
    wide = config | {name: 64 for name in sizes if name in config}
    if "mamba_n_heads" in config:  # its heads are twice as wide as the model, together
        wide["mamba_d_head"] = 2 * 64 // config["mamba_n_heads"]
    write(model_type, reference(model_type, wide), path)
    return path


@pytest.mark.parametrize(("model_type", "name"), QUANTIZED)
def test_experts_are_quantised_while_loading(model_type: str, name: str, tmp_path: Path) -> None:
    folder = write_wide(model_type, tmp_path / "dense")
    model = load(folder, quantization=name)
    dense = load(folder)
    for index, moe in moe_layers(model).items():
        assert moe.quantized is not None and moe.quantized.name == name
        own = moe_layers(dense)[index]
        for part in ("w13", "w2"):
            weights = getattr(moe, part)
            assert isinstance(weights, QuantizedWeights)
            values = weights().dequantize().float().reshape(getattr(own, part).shape)
            setattr(own, part, nn.Parameter(values))
    ids = token_ids(2, 13)
    with torch.inference_mode():
        logits = model(ids).logits
        if name != "fp8_w8a8":  # which rounds what goes into the experts as well
            assert_close(logits, dense(ids).logits)
        model.save_pretrained(tmp_path / "quantized")
        assert load(tmp_path / "quantized")(ids).logits.equal(logits)


def test_inspection_counts_what_there_is(folder: Path, model: PreTrainedModel) -> None:
    report = moezoo.inspect(folder)
    assert report.supported, report.reason
    assert report.parameters == sum(p.numel() for p in model.parameters())
    layers = moe_layers(model)
    assert report.num_moe_layers == len(layers)
    idle = 0
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        model(token_ids(1, 3))
    for row, moe in enumerate(layers.values()):
        num_experts, per_token = moe.w2.shape[0], trace.topk_ids[row].shape[1]
        parts = (moe.w13, moe.w2, moe.bias13, moe.bias2)
        numbers = sum(part.numel() for part in parts if part is not None)
        idle += numbers // num_experts * max(num_experts - per_token, 0)
    assert report.active_parameters == report.parameters - idle
    stacked = sum(moe.w13.nbytes + moe.w2.nbytes for moe in layers.values())
    assert report.expert_bytes_on_disk >= stacked


def test_transformers_reads_what_is_written_in_16_bit(folder: Path, tmp_path: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    if idle_experts(model):
        pytest.skip("transformers asks for weights of experts that do nothing")
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = token_ids(2, 13)
    with torch.inference_mode():
        assert_close(load(tmp_path, dtype=torch.float32)(ids).logits, theirs(ids).logits)


EXTRA_LAYER = ("eh_proj.weight", "enorm.weight", "self_attn.q_proj.weight")
PREDICTION = {
    "ernie4_5_moe": ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight"],
    "exaone_moe": ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"],
    "glm4_moe": [f"model.layers.3.{name}" for name in EXTRA_LAYER],
    "glm4_moe_lite": [f"model.layers.3.{name}" for name in EXTRA_LAYER],
    "hy_v3": [f"model.layers.3.{name}" for name in EXTRA_LAYER],
    "mimo_v2_flash": ["model.mtp.layers.0.eh_proj.weight"],
}


@pytest.mark.parametrize("model_type", PREDICTION)
def test_what_predicts_several_tokens_is_left_out(model_type: str, tmp_path: Path) -> None:
    write(
        model_type, reference(model_type, next(iter(CONFIGURATIONS[model_type].values()))), tmp_path
    )
    ids = token_ids(2, 13)
    logits = load(tmp_path)(ids).logits
    path = tmp_path / "model.safetensors"
    more = dict.fromkeys(PREDICTION[model_type], torch.ones(3))
    save_file(load_file(path) | {name: x.clone() for name, x in more.items()}, path)
    assert load(tmp_path)(ids).logits.equal(logits)

"""Quantised models saved in the hub's layouts: the same bits come back, and compressed-tensors' own
package and transformers read the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    ASSET,
    EXACT,
    assert_same,
    distance,
    ids,
    load,
    moe_layers,
    plain,
    set_config,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig
from written_module import write_weights

import moezoo
from moezoo.errors import QuantizationError
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import Int8, Mxfp4
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.convert import convert
from moezoo.loaders.hub_layout import hub_config
from moezoo.loaders.make import from_config
from moezoo.loaders.mapping import Rule
from moezoo.loaders.weights import load_weights

ASKED: dict[str, Any] = {
    "fp8-channel": {"type": "fp8_w8a8", "granularity": "channel"},
    "fp8-tensor": {"type": "fp8_w8a8", "granularity": "tensor"},
    "int8": "int8_w8a16",
    "int8-group": {"type": "int8_w8a16", "group_size": 32},
    "int4": "int4_w4a16",
    "int4-row": {"type": "int4_w4a16", "per_channel": True},
    "int4-zeros": {"type": "int4_w4a16", "group_size": 64, "symmetric": False},
    "mxfp4": "mxfp4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("plain")
    plain("qwen2_moe").save_pretrained(folder)
    return folder


def by_package(folder: Path) -> dict[str, Tensor]:
    """The weights of every quantised module, as compressed-tensors decompresses them."""
    package = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig(
        **json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        assert not any(match_name(module, entry) for entry in config.ignore)
        schemes = [
            scheme
            for scheme in config.config_groups.values()
            if any(target == "Linear" or match_name(module, target) for target in scheme.targets)
        ]
        assert len(schemes) == 1, module
        stored_as = schemes[0].format or config.format
        compressor = package.BaseCompressor.get_value_from_registry(stored_as)
        state = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{module}.")}
        found[module] = compressor.decompress(state, schemes[0])["weight"].float()
    for name, tensor in stored.items():
        if name.endswith("proj.weight") and tensor.dtype == torch.float32:
            module = name.removesuffix(".weight")
            assert any(match_name(module, entry) for entry in config.ignore), module
    return found


@pytest.mark.parametrize("name", ASKED)
def test_saved_and_read_again(folder, tmp_path, name, caplog):
    model = load(folder, quantization=ASKED[name])
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path)
    unread = "have zero points: moezoo loads it, but transformers does not"
    assert caplog.text.count("transformers does not") == caplog.text.count(unread)
    assert (unread in caplog.text) == (name == "int4-zeros")
    assert_same(load(tmp_path), model)
    again = load(tmp_path, dtype="bfloat16")
    assert moe_layers(again)[0].w13.scales.dtype == moe_layers(model)[0].w13.scales.dtype
    expected = {}
    for n, moe in enumerate(moe_layers(model)):
        w13, w2 = moe.w13().dequantize(), moe.w2().dequantize()
        for e in range(len(w2)):
            module = f"model.layers.{n}.mlp.experts.{e}"
            expected |= {f"{module}.gate_proj": w13[e, 0], f"{module}.up_proj": w13[e, 1]}
            expected[f"{module}.down_proj"] = w2[e]
    found = by_package(tmp_path)
    assert found.keys() == expected.keys()
    for module, w in found.items():
        assert w.equal(expected[module]), module
    if name == "int4-zeros":
        return  # transformers does not read zero points of experts
    from transformers import CompressedTensorsConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).state_dict()
    for n, moe in enumerate(moe_layers(model)):
        module = f"model.layers.{n}.mlp.experts"
        assert theirs[f"{module}.gate_up_proj"].equal(moe.w13().dequantize().flatten(1, 2))
        assert theirs[f"{module}.down_proj"].equal(moe.w2().dequantize())


@pytest.mark.parametrize("name", ASKED)
def test_dequantized(folder, tmp_path, name):
    """The model is that of the dequantised weights, in transformers too, and can be trained."""
    model = load(folder, quantization=ASKED[name])
    weights = [(moe.w13().dequantize(), moe.w2().dequantize()) for moe in moe_layers(model)]
    assert model.dequantize() is model
    assert not hasattr(model.config, "quantization_config")
    for moe, (w13, w2) in zip(moe_layers(model), weights, strict=True):
        assert moe.quantized is None and moe.w13.equal(w13.flatten(1, 2)) and moe.w2.equal(w2)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert distance(model(ids(2, 9)).logits, theirs(ids(2, 9)).logits) < EXACT
    model.requires_grad_(True)
    model(ids(2, 9), labels=ids(2, 9)).loss.backward()
    assert all(moe.w13.grad.any() and moe.w2.grad.any() for moe in moe_layers(model))


def test_experts_of_several_ranks_stay_quantised(folder):
    model = load(folder, quantization="int8_w8a16")
    first, *_ = moe_layers(model)
    first.dispatcher = object()
    with pytest.raises(ValueError, match="divided over ranks stay quantised; load the model with"):
        model.dequantize()
    assert all(moe.quantized is Int8 for moe in moe_layers(model))


@pytest.mark.parametrize(
    ("name", "data"),
    [("int8", "weight_packed"), ("int4-row", "weight_packed"), ("fp8-channel", "weight")],
)
def test_columns_that_are_missing(folder, tmp_path, name, data):
    load(folder, quantization=ASKED[name]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.1.mlp.experts.2.down_proj"
    tensors[f"{expert}.{data}"] = tensors[f"{expert}.{data}"][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(QuantizationError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "1 tensor of the wrong shape" in message and "in model.safetensors" in message
    assert f"{expert}.{data}" in message and "layers.1.mlp.w2 takes" in message


@pytest.mark.parametrize("name", ["fp8-block", "fp8-channel", "int8", "int4"])
def test_a_tied_head_is_not_quantised_in_transformers(tmp_path, name):
    plain("qwen3_moe").save_pretrained(tmp_path / "plain")
    asked = ASKED.get(name, "fp8_w8a8")
    model = load(tmp_path / "plain", quantization=asked)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    described = config["quantization_config"]
    kept = described.get("ignore", described.get("modules_to_not_convert"))
    assert "lm_head" in kept
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    dequantized = (
        FineGrainedFP8Config(dequantize=True, modules_to_not_convert=kept)
        if name == "fp8-block"
        else CompressedTensorsConfig(dequantize=True)
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, quantization_config=dequantized
    )
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    with torch.no_grad():
        expected = theirs(ids(2, 9)).logits
        # fp8 rounds activations too, which transformers does not do with dequantised weights.
        tolerance = 0.15 if "fp8" in name else EXACT
        assert distance(model(ids(2, 9)).logits, expected) < tolerance


ODD: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 100,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
}


@pytest.mark.parametrize(
    ("asked", "width"),
    [("int8_w8a16", 33), ("int8_w8a16", 36), ("int8_w8a16", 130), (ASKED["int4-row"], 36)],
    ids=str,
)
def test_columns_that_do_not_fill_words(tmp_path, asked, width):
    config = MixtralConfig(**ODD | {"intermediate_size": width}, head_dim=32)
    model = from_config(config, device="cpu", quantization=asked)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    module = "model.layers.0.block_sparse_moe.experts.0.w2"
    assert stored[f"{module}.weight_shape"].tolist() == [100, width]
    assert_same(load(tmp_path / "saved"), model)
    assert moezoo.inspect(tmp_path / "saved").supported
    w2 = moe_layers(model)[0].w2().dequantize()
    assert by_package(tmp_path / "saved")[module].equal(w2[0])
    convert(open_checkpoint(tmp_path / "saved"), tmp_path / "again", device="cpu")
    assert_same(load(tmp_path / "again"), model)


def test_weight_only_fp8_is_reported(folder, tmp_path, caplog):
    load(folder, quantization=ASKED["fp8-channel"]).save_pretrained(tmp_path)
    load(tmp_path)
    assert "run as fp8_w8a8" not in caplog.text
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    described["config_groups"]["group_0"]["input_activations"] = None
    set_config(tmp_path, quantization_config=described)
    load(tmp_path)
    assert caplog.text.count("quantises no activations run as fp8_w8a8") == 1
    stored_as = moezoo.inspect(tmp_path).stored_as
    assert stored_as.endswith("the experts of 2 of 2 MoE layers stay so")


@pytest.mark.parametrize(("width", "hidden"), [(192, 128), (128, 192), (64, 100), (256, 128)])
def test_blocks_that_transformers_cuts_otherwise(tmp_path, caplog, width, hidden):
    sizes = {"intermediate_size": width, "hidden_size": hidden}
    model = from_config(
        MixtralConfig(**ODD | sizes, head_dim=32), device="cpu", quantization="fp8_w8a8"
    )
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)
    from transformers import FineGrainedFP8Config

    how = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=how
    ).state_dict()
    w2 = theirs["model.layers.0.mlp.experts.down_proj"]
    w13 = theirs["model.layers.0.mlp.experts.gate_up_proj"]
    moe = moe_layers(model)[0]
    same = w2.equal(moe.w2().dequantize()) and w13.equal(moe.w13().dequantize().flatten(1, 2))
    warned = "in weights of 192 columns or rows: moezoo loads them, but transformers does not"
    assert (warned in caplog.text) == (not same) == (192 in (width, hidden))


@pytest.mark.parametrize("width", [33, 36, 130])
def test_zero_points_of_rows_that_do_not_fill_words(tmp_path, width):
    """A model quantised by hand."""
    config = MixtralConfig(**ODD | {"intermediate_size": width}, head_dim=32)
    model = from_config(config, device="cpu")
    (moe,) = moe_layers(model)
    w13, w2 = (Int8.quantize(w.detach(), zeros=True) for w in (moe.w13, moe.w2))
    moe.quantize_(w13.in_parts(2), w2)
    model.save_pretrained(tmp_path / "saved")
    module = "model.layers.0.block_sparse_moe.experts.0.w1"
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored[f"{module}.weight_zero_point"].shape == (-(-width // 4), 1)
    assert_same(load(tmp_path / "saved"), model)
    found = by_package(tmp_path / "saved")
    assert found[module].equal(w13.dequantize()[0, :width])
    assert found[module.replace("w1", "w2")].equal(w2.dequantize()[0])
    convert(open_checkpoint(tmp_path / "saved"), tmp_path / "again", device="cpu")
    assert_same(load(tmp_path / "again"), model)


def test_int8_that_is_not_packed_has_any_columns(tmp_path):
    """What the package writes as int-quantized."""
    config = MixtralConfig(**ODD | {"intermediate_size": 33}, head_dim=32)
    model = from_config(config, device="cpu", quantization="int8_w8a16")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.endswith("_packed")]:
        module = name.removesuffix(".weight_packed")
        n, k = stored.pop(f"{module}.weight_shape").tolist()
        codes = stored.pop(name).view(torch.uint8)[:, :k] ^ 128
        assert codes.shape == (n, k)
        stored[f"{module}.weight"] = codes.view(torch.int8).contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    described["format"] = described["config_groups"]["group_0"]["format"] = "int-quantized"
    set_config(tmp_path, quantization_config=described)
    assert_same(load(tmp_path), model)


def test_groups_of_several_sizes(tmp_path, caplog):
    """The experts are 64 wide: groups of 128, and of 64, which are rows: two schemes."""
    model = load(ASSET, quantization="int4_w4a16", dtype="float32")
    model.save_pretrained(tmp_path)
    assert caplog.text.count("(formats, or sizes of groups): moezoo loads it, but transf") == 1
    assert "quantise to {'type': 'int4_w4a16', 'group_size': 64}" in caplog.text
    assert_same(load(tmp_path, dtype="float32"), model)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    targets = {group["weights"]["group_size"]: group["targets"] for group in groups}
    assert targets.keys() == {128, 64}
    assert r"re:model\.layers\.5\.mlp\.experts\.\d+\.down_proj$" in targets[64]
    assert len(by_package(tmp_path)) == 6 * 16 * 3


def test_layers_that_are_not_quantised(folder, tmp_path, caplog):
    model = load(folder, quantization="int8_w8a16")
    moe = moe_layers(model)[1]
    w13, w2 = moe.w13().dequantize().flatten(1, 2), moe.w2().dequantize()
    del moe.w13, moe.w2
    moe.w13, moe.w2 = (nn.Parameter(w, requires_grad=False) for w in (w13, w2))
    model.save_pretrained(tmp_path)
    assert caplog.text.count("(some experts are not): moezoo loads it, but transformers") == 1
    assert_same(load(tmp_path), model)
    assert {module.split(".")[2] for module in by_package(tmp_path)} == {"0"}


def test_mxfp4_where_experts_are_stored_in_one_tensor(tmp_path):
    """As gpt-oss: blocks, gate and up rows in turn."""
    generator = torch.Generator().manual_seed(0)
    w13 = Mxfp4.quantize(torch.randn(3, 2, 64, 128, generator=generator))
    w2 = Mxfp4.quantize(torch.randn(3, 128, 64, generator=generator))
    rules = [
        Rule("gate", "router"),
        Rule("w13", "e.gate_up_proj", shard="expert", view=("transpose", "deinterleave")),
        Rule("w2", "e.down_proj", shard="expert", view="transpose"),
    ]
    moe = FusedMoE(128, 64, 3, None)
    moe.quantize_(w13, w2)
    write_weights(moe, rules, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    set_config(tmp_path, quantization_config=hub_config(moe, rules))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["e.gate_up_proj_blocks"].shape == (3, 128, 4, 16)
    assert stored["e.gate_up_proj_blocks"][:, 1::2].flatten(2).equal(w13.data[:, 1])
    with torch.device("meta"):
        again = FusedMoE(128, 64, 3, None)
    options: Any = {"device": torch.device("cpu"), "dtype": torch.float32}
    load_weights(again, open_checkpoint(tmp_path), rules, **options)
    assert_same(again, moe)
    w13, w2 = (Int8.quantize(w.dequantize()) for w in (w13, w2))
    moe = FusedMoE(128, 64, 3, None)
    moe.quantize_(w13, w2)
    with pytest.raises(QuantizationError, match=r"e.gate_up_proj cannot be written: .* int8_w8a16"):
        write_weights(moe, rules, tmp_path)

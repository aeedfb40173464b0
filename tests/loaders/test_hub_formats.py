"""Checkpoints in the hub's quantised formats: the experts become what is stored bit for bit, and
the logits are those of a checkpoint with the decoded weights.

compressed-tensors' own package writes its checkpoints here, and transformers' decoder reads mxfp4;
GPTQ and AWQ are written and decoded by `hub_writers`, from the definitions of their layouts.
"""

import json
import logging
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_writers import Encoded, awq, compressed_tensors, gptq, ordered_compressed_tensors
from safetensors.torch import load_file, save_file
from small_models import (
    ASSET,
    EXACT,
    assert_same,
    change,
    distance,
    ids,
    load,
    moe_layers,
    plain,
    round_inputs,
    set_config,
)
from test_saved_quantized import by_package
from torch import Tensor
from transformers import AutoConfig

import moezoo
from moezoo.errors import CheckpointError, QuantizationError
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import BlockFp8, ChannelFp8, Int4, Int8, Mxfp4, QuantizedWeights
from moezoo.layers.quant.fp8 import FOR_EXPERTS, FOR_LINEARS
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.convert import convert
from moezoo.loaders.encodings import encoding_of, hub_scheme
from moezoo.loaders.headers import StoredTensor
from moezoo.loaders.linears import linears_of
from moezoo.loaders.mapping import Rule
from moezoo.loaders.weights import load_weights, with_orders

FILE = "model.safetensors"
ACTIVATIONS = 0.15
"""What quantised activations make of the logits of these random models, loosely."""
ROUNDED = 1e-2
"""A number on the other side of a step of fp8 now and then."""
LAYERS = {"attn.qkv", "attn.o", "shared.gate_up", "shared.down"}
GROUPS_OF_32 = {"num_bits": 4, "group_size": 32, "strategy": "group"}
KEPT = ("embed_tokens", "lm_head", "norm", ".gate", "_gate", "layernorm")
Encode = Callable[[Tensor], Encoded]


def quantized_module(name: str, kept: tuple[str, ...] = KEPT) -> str | None:
    """The module of a linear weight that quantisers take."""
    module, _, end = name.rpartition(".")
    return None if end != "weight" or module.endswith(kept) else module


def write(
    folder: Path,
    encode: Encode | Callable[[str], Encode | None],
    config: dict[str, Any],
    **how: Any,
) -> tuple[Path, Path]:
    """A checkpoint whose linear layers are encoded, and one with what they decode to.

    `how` may have a `model_type`, `by_name`, whether `encode` says how to by the module, and what
    is not encoded, `kept`.
    """
    by_name = how.get("by_name", False)
    plain(how.get("model_type", "qwen2_moe")).save_pretrained(folder / "dense")
    stored = load_file(folder / "dense" / FILE)
    dense = {}
    for name, w in list(stored.items()):
        module = quantized_module(name, how.get("kept", KEPT))
        how_to: Any = encode(module) if by_name and module else encode
        if module is None or how_to is None:
            continue
        encoded, dense[name] = how_to(w)
        del stored[name]
        stored |= {f"{module}.{end}": tensor for end, tensor in encoded.items()}
    (folder / "hub").mkdir()
    save_file(stored, folder / "hub" / FILE, metadata={"format": "pt"})
    for file in (folder / "dense").glob("*.json"):
        (folder / "hub" / file.name).write_text(file.read_text())
    change(folder / "dense", lambda tensors: tensors.update(dense))
    set_config(folder / "hub", quantization_config=config)
    return folder / "hub", folder / "dense"


def check(hub: Path, dense: Path, kind: type, *, exact: bool = True) -> Any:
    """The experts and linear layers of `hub` are of this format, with the weights of `dense`, but
    for those that cannot be; so are the logits."""
    model, expected = (load(folder, dtype="float32") for folder in (hub, dense))
    for moe, full in zip(moe_layers(model), moe_layers(expected), strict=True):
        assert isinstance(moe.w13(), kind) and isinstance(moe.w2(), kind)
        assert moe.w13().dequantize().flatten(1, 2).equal(full.w13)
        assert moe.w2().dequantize().equal(full.w2)
    state, others = model.state_dict(), expected.state_dict()
    for name in state.keys() & others.keys():
        assert state[name].equal(others[name]), name
    layers, full_layers = (dict(linears_of(m.decoder)) for m in (model, expected))
    for name, layer in layers.items():
        if isinstance(layer.weight, QuantizedWeights):
            weight = layer.weight()
            assert isinstance(weight, kind)
            assert weight.dequantize().equal(full_layers[name].weight), name
    with torch.no_grad():
        tolerance = EXACT if exact else ACTIVATIONS
        logits = model(ids(2, 9)).logits
        assert distance(logits, expected(ids(2, 9)).logits) < tolerance
        # Experts quantised, linear layers not: the same, if what these take is rounded.
        other = load(hub, dtype="float32", quantization={"dense": "dequantize"})
        assert not quantized_layers(other)
        round_inputs(other, model)
        assert distance(logits, other(ids(2, 9)).logits) < (EXACT if exact else ROUNDED)
    return model


def quantized_layers(model: Any) -> set[str]:
    """The last parts of the names of linear layers that are."""
    return {
        ".".join(name.split(".")[-3:-1])
        for name, layer in linears_of(model.decoder).items()
        if isinstance(layer.weight, QuantizedWeights)
    }


GPTQ_CASES: dict[str, dict[str, Any]] = {
    "sym": {},
    "asym": {"sym": False},
    "v2": {"v2": True},
    "v2-asym": {"v2": True, "sym": False, "group_size": 128},
    "desc_act": {"desc_act": True},
    "desc_act-asym": {"desc_act": True, "sym": False, "group_size": 64},
    "a-row": {"group_size": -1, "desc_act": True, "sym": False},
    "8-bit": {"bits": 8},
    "8-bit-desc_act": {"bits": 8, "desc_act": True, "v2": True},
    "8-bit-asym": {"bits": 8, "sym": False},
    "8-bit-desc_act-asym": {"bits": 8, "desc_act": True, "v2": True, "sym": False},
    "8-bit-a-row": {"bits": 8, "group_size": -1, "sym": False},
}


def gptq_config(bits=4, group_size=32, sym=True, desc_act=False, v2=False) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "damp_percent": 0.01,
        "true_sequential": True,
        "modules_in_block_to_quantize": None,
    }


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq(tmp_path, case):
    how = GPTQ_CASES[case]
    hub, dense = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    model = check(hub, dense, Int8 if how.get("bits") == 8 else Int4)
    w13 = moe_layers(model)[0].w13()
    ordered = how.get("desc_act", False) and how.get("group_size") != -1
    assert (w13.order is not None) == ordered
    assert w13.scales.dtype == torch.float16
    assert quantized_layers(model) == LAYERS
    assert moezoo.inspect(hub).stored_as.count("weights of linear layers") == 1
    assert (model.decoder.layers[0].attn.qkv.weight().order is not None) == ordered
    assert (w13.zeros is not None) == (not how.get("sym", True))


NEGATIVE: dict[str, tuple[dict[str, Any], Encode]] = {
    "gptq": (gptq_config(), gptq),
    "gptq-8": (gptq_config(bits=8), lambda w: gptq(w, bits=8)),
    "gptq-asym-order": (
        gptq_config(sym=False, desc_act=True),
        lambda w: gptq(w, sym=False, desc_act=True),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        lambda w: awq(w, group_size=32),
    ),
}


@pytest.mark.parametrize("case", NEGATIVE)
def test_negative_scales(tmp_path, case):
    """As AutoRound writes groups whose largest weight is above zero."""
    config, of = NEGATIVE[case]

    def encode(w: Tensor) -> Encoded:
        encoded, back = of(w)
        encoded["scales"][1::2] *= -1
        groups = encoded.get("g_idx", torch.arange(w.shape[1]) // 32)
        return encoded, back * (1 - 2 * (groups % 2))

    hub, dense = write(tmp_path, encode, config)
    model = check(hub, dense, Int8 if case == "gptq-8" else Int4)
    assert (moe_layers(model)[0].w2().scales < 0).any()
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", dtype="float32"), model)
    for wrong in (0.0, torch.nan, -torch.inf):
        change(hub, lambda s, wrong=wrong: s[f"{GATE}.scales"][1, 2].fill_(wrong))
        with pytest.raises(QuantizationError) as caught:
            load(hub)
        assert f"{GATE}.scales in {FILE}: the scale at [1, 2] is {wrong}" in str(caught.value)


RULES: dict[str, dict[str, Any]] = {
    r"-:model\.layers\.1\.self_attn\..*": {},
    r"+:.*\.self_attn\.": {"bits": 8, "group_size": 64},
    r".*\.layers\.1\.mlp\.experts\.": {"group_size": 128, "sym": False, "desc_act": True},
    "+:lm_head": {"bits": 8},  # which is not quantised
    "-:nowhere": {},
    ".*": {"damp_percent": 0.1},
    "+:.*shared.*": {"bits": 8},  # after one that matches too
}


def test_gptq_rules_of_modules(tmp_path, caplog):
    """The first that matches counts."""

    def how(module: str) -> Encode | None:
        if "layers.1.self_attn" in module:
            return None
        if "self_attn" in module:
            return lambda w: gptq(w, bits=8, group_size=64)
        if "layers.1.mlp.experts" in module:
            return lambda w: gptq(w, group_size=128, sym=False, desc_act=True)
        return gptq

    hub, dense = write(tmp_path, how, gptq_config() | {"dynamic": RULES}, by_name=True)
    model, expected = (load(folder, dtype="float32") for folder in (hub, dense))
    first, second = model.decoder.layers
    assert isinstance(first.attn.qkv.weight(), Int8) and first.attn.qkv.weight().group_size == 64
    assert not isinstance(second.attn.qkv.weight, QuantizedWeights)
    assert second.mlp.shared.down.weight().zeros is None
    assert [moe.w13().group_size for moe in moe_layers(model)] == [32, 128]
    assert [moe.w13().order is None for moe in moe_layers(model)] == [True, False]
    assert [moe.w13().zeros is None for moe in moe_layers(model)] == [True, False]
    with torch.no_grad():
        assert distance(model(ids(2, 9)).logits, expected(ids(2, 9)).logits) < EXACT
    for moe, full in zip(moe_layers(model), moe_layers(expected), strict=True):
        assert moe.w13().dequantize().flatten(1, 2).equal(full.w13)
        assert moe.w2().dequantize().equal(full.w2)
    without = gptq_config() | {"dynamic": {"-:nowhere": {"bits": 8}}}
    set_config(hub, quantization_config=without)
    with pytest.raises(
        QuantizationError, match=r"layers\.0\.self_attn\.\S+ .*with the bits and gr"
    ):
        load(hub)
    assert "nowhere" not in caplog.text
    contradicted = gptq_config() | {"dynamic": {r"-:model\.layers\.0\.mlp": {}}}
    set_config(hub, quantization_config=contradicted)
    with pytest.raises(QuantizationError, match=r"says that model\.layers\.0\.mlp\S+ is not q"):
        load(hub)


def test_gptq_names_its_format_in_two_ways(tmp_path):
    """Zero points are read by it."""
    how = {"v2": True, "sym": False}
    config = gptq_config(**how)
    config["format"] = config.pop("checkpoint_format")
    check(*write(tmp_path, lambda w: gptq(w, **how), config), Int4)


def test_gptq_orders_of_none(tmp_path):
    """desc_act that moved no column has no order."""
    hub, dense = write(tmp_path, gptq, gptq_config(desc_act=True))
    model = check(hub, dense, Int4)
    assert moe_layers(model)[0].w13().order is None
    assert model.decoder.layers[0].attn.o.weight().order is None
    model = load(hub)
    model.save_pretrained(tmp_path / "saved")
    convert(open_checkpoint(hub), tmp_path / "converted", device="cpu")
    for file in ("config.json", "model.safetensors"):
        saved, converted = (tmp_path / name / file for name in ("saved", "converted"))
        assert saved.read_bytes() == converted.read_bytes(), file


def test_parts_with_orders_of_their_own(tmp_path, caplog, monkeypatch):
    def how(module: str) -> Encode:
        return lambda w: gptq(w, desc_act=True, seed=len(module))

    hub, dense = write(tmp_path, how, gptq_config(desc_act=True), by_name=True)
    model = check(hub, dense, Int4)
    # q, k and v have names of one length; gate and up have not.
    assert quantized_layers(model) == LAYERS - {"shared.gate_up"}
    assert (
        "4 weights dequantised (parts of one layer with columns in different orders): "
        "model.layers.*.mlp.shared_expert.gate_proj.weight, "
        "model.layers.*.mlp.shared_expert.up_proj.weight"
    ) in caplog.text
    convert(open_checkpoint(hub), tmp_path / "to", device="cpu")
    assert_same(load(tmp_path / "to"), load(hub))
    needed = []
    monkeypatch.setattr(
        "moezoo.loaders.weights.check_memory",
        lambda wanted, *_: needed.append(
            sum(i.dtype.itemsize * prod(i.shape) for i in wanted.values())
        ),
    )
    model = load(hub)
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert needed[0] < needed[1] and held <= needed[1]


@pytest.mark.parametrize("experts", [True, False])
def test_a_gpu_without_fp8(tmp_path, monkeypatch, experts):
    """What to do depends on what is in fp8."""
    stored, weights, _ = COMPRESSED["fp8-channel"]
    ignore = ["lm_head", "re:.*gate$"] + [r"re:.*\.experts\..*"] * (not experts)
    scheme = {"targets": ["Linear"], "weights": weights}
    encode = compressed_tensors(stored, **weights)
    hub, _ = write(
        tmp_path,
        lambda module: None if not experts and ".experts." in module else encode,
        compressed_config(stored, ignore, g=scheme),
        by_name=True,
    )
    told = []
    monkeypatch.setattr(
        "moezoo.loaders.weights.require_fp8", lambda device, instead: told.append(instead)
    )
    load(hub)
    assert told == [FOR_EXPERTS if experts else FOR_LINEARS]


def test_groups_larger_than_ours(tmp_path):
    """256 columns are two groups of 128 with one scale."""
    stored: dict[str, Tensor] = {"gate": torch.zeros(2, 512)}
    dense = {}
    for name, shape in (("g", (256, 512)), ("u", (256, 512)), ("d", (512, 256))):
        for e in range(2):
            w = torch.randn(shape, generator=torch.Generator().manual_seed(e))
            how = {"group_size": 256, "sym": False, "desc_act": True}
            encoded, dense[f"{e}.{name}"] = gptq(w, **how)
            stored |= {f"{e}.{name}.{end}": tensor for end, tensor in encoded.items()}
    save_file(stored, tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": gptq_config(**how)}))
    rules = [
        Rule("gate", "gate"),
        Rule("w13", "{E}.g.weight", "{E}.u.weight", shard="expert"),
        Rule("w2", "{E}.d.weight", shard="expert"),
    ]
    with torch.device("meta"):
        moe = FusedMoE(512, 256, 2, None)
    options: Any = {"device": torch.device("cpu"), "dtype": torch.float32}
    load_weights(moe, open_checkpoint(tmp_path), rules, **options)
    assert moe.w13().group_size == 128 and moe.w13().order is not None
    assert moe.w2().group_size == 256 and moe.w2().order is None
    for e in range(2):
        assert moe.w13().dequantize()[e].equal(torch.stack((dense[f"{e}.g"], dense[f"{e}.u"])))
        assert moe.w2().dequantize()[e].equal(dense[f"{e}.d"])


AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_awq(tmp_path, group_size):
    config = AWQ | {"group_size": group_size, "modules_to_not_convert": ["gate"]}
    hub, dense = write(tmp_path, lambda w: awq(w, group_size=group_size), config)
    model = check(hub, dense, Int4)
    assert moe_layers(model)[0].w2().zeros is not None
    assert quantized_layers(model) == LAYERS


COMPRESSED: dict[str, tuple[str, dict[str, Any], type]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}, Int4),
    "int4-zeros": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 128, "strategy": "group", "symmetric": False},
        Int4,
    ),
    "int4-row": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, Int4),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, Int8),
    "int8-group": ("pack-quantized", {"num_bits": 8, "group_size": 64, "strategy": "group"}, Int8),
    "int8-zeros": (
        "pack-quantized",
        {"num_bits": 8, "group_size": 64, "strategy": "group", "symmetric": False},
        Int8,
    ),
    "int8-row-zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        Int8,
    ),
    "int8-tensor-zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
        Int8,
    ),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, Int8),
    "int8-unpacked-group-zeros": (
        "int-quantized",
        {"num_bits": 8, "group_size": 32, "strategy": "group", "symmetric": False},
        Int8,
    ),
    "int8-unpacked-row-zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        Int8,
    ),
    "int8-unpacked-tensor-zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
        Int8,
    ),
    "fp8-channel": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        ChannelFp8,
    ),
    "fp8-tensor": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        ChannelFp8,
    ),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        BlockFp8,
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "group_size": 32,
            "strategy": "group",
            "scale_dtype": torch.uint8,
            "zp_dtype": torch.uint8,
        },
        Mxfp4,
    ),
}


def compressed_config(stored: str, ignore: list[str], **groups: dict[str, Any]) -> dict[str, Any]:
    """As the package writes it."""
    package = pytest.importorskip("compressed_tensors.quantization")
    schemes = {name: package.QuantizationScheme(**scheme) for name, scheme in groups.items()}
    config = package.QuantizationConfig(config_groups=schemes, format=stored, ignore=ignore)
    written = config.to_dict() | {"quantization_status": "compressed"}
    return json.loads(json.dumps(written, default=str))


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(tmp_path, case):
    stored, weights, kind = COMPRESSED[case]
    config = compressed_config(
        stored, ["lm_head", "re:.*gate$"], group_0={"targets": ["Linear"], "weights": weights}
    )
    hub, dense = write(tmp_path, compressed_tensors(stored, **weights), config)
    model = check(hub, dense, kind, exact="fp8" not in case)
    assert quantized_layers(model) == LAYERS
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", dtype="float32"), model)
    if kind is not BlockFp8:
        written, stored = by_package(tmp_path / "again"), by_package(hub)
        assert written.keys() == stored.keys()
        assert all(w.equal(stored[module]) for module, w in written.items())
    assert (moe_layers(model)[0].w13().tensors().get("zeros") is not None) == ("zeros" in case)
    if case not in ("int4-zeros", "int8", "int8-zeros", "fp8-channel", "mxfp4"):
        return
    engine = Engine(model.decoder, num_rows=2, context=32, chunk=16)
    requests = [Request(i, prompt, 5) for i, prompt in enumerate(ids(3, 6).tolist())]
    list(Batcher(engine, engine.greedy, ends=set()).run(iter(requests)))
    one_by_one = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    for request, prompt in zip(requests, ids(3, 6), strict=True):
        assert request.tokens == model.generate(prompt[None], **one_by_one)[0, 6:].tolist()


def test_a_head_and_latent_attention(tmp_path, caplog):
    """Heads of several formats, and a matrix that attention takes apart."""
    stored, weights, kind = COMPRESSED["int8-group"]
    scheme = {"targets": ["Linear"], "weights": weights}
    config = compressed_config(stored, ["re:.*gate$"], group_0=scheme)
    encode = compressed_tensors(stored, **weights)
    kept = tuple(name for name in KEPT if name != "lm_head")
    how = {"model_type": "deepseek_v3", "kept": kept}
    hub, dense = write(tmp_path, encode, config, **how)
    model = check(hub, dense, kind)
    expected = {"lm_head", "q.a", "q.b", "attn.kv_a", "attn.o", "mlp.gate_up", "mlp.down"}
    assert quantized_layers(model) == expected | {"shared.gate_up", "shared.down"}
    assert (
        "3 weights dequantised (their layer takes them apart): "
        "model.layers.*.self_attn.kv_b_proj.weight" in caplog.text
    )
    assert ", 3 quantised weights are dequantised when" in moezoo.inspect(hub).stored_as
    convert(open_checkpoint(hub), tmp_path / "to", device="cpu", dtype="float32")
    assert_same(load(tmp_path / "to"), model)
    card = (tmp_path / "to" / "README.md").read_text()
    assert "| linear layers | some in int8_w8a16 in groups of 64 |" in card


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_compressed_tensors_with_an_order(tmp_path, bits, symmetric):
    weights = {"num_bits": bits, "group_size": 32, "strategy": "group", "symmetric": symmetric}
    scheme = {"targets": ["Linear"], "weights": weights}
    config = compressed_config("pack-quantized", ["lm_head"], group_0=scheme)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    how: Any = {"group_size": 32, "bits": bits, "symmetric": symmetric}
    hub, dense = write(tmp_path, lambda w: ordered_compressed_tensors(w, **how), config)
    model = check(hub, dense, Int4 if bits == 4 else Int8)
    w2 = moe_layers(model)[0].w2()
    assert w2.order is not None and (w2.zeros is None) == symmetric
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", dtype="float32"), model)


def test_8_bits_with_zero_points_are_reported(tmp_path, caplog):
    how = {"bits": 8, "sym": False, "group_size": 64}
    hub, _ = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    described = "int8_w8a16 in groups of 64, with zero points"
    stays = f"{described}: the experts of 2 of 2 MoE layers stay so, 14 weights of linear layers in"
    assert stays in moezoo.inspect(hub).stored_as
    caplog.set_level(logging.INFO)
    model = load(hub, quantization="int8_w8a16")
    assert f"14 weights of linear layers stay in {described}" in caplog.text
    assert "dequantised" not in caplog.text
    convert(open_checkpoint(hub), tmp_path / "to", device="cpu")
    assert_same(load(tmp_path / "to"), model)
    assert f"| experts | in {described} |" in (tmp_path / "to" / "README.md").read_text()


def test_a_config_alone_of_8_bits_with_zero_points():
    config = AutoConfig.from_pretrained(ASSET)
    config.quantization_config = gptq_config(bits=8, sym=False)
    model = moezoo.from_config(config, dtype="float32", device="cpu")
    for moe in moe_layers(model):
        assert moe.quantized is Int8 and moe.w13().zeros is not None


def test_schemes_that_differ_by_module(tmp_path, caplog):
    """fp8 attention with static activations, int4 experts, one layer not quantised."""
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    int4 = {"num_bits": 4, "group_size": 64, "strategy": "group"}
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    ignore = ["lm_head", "re:.*gate$", r"re:.*layers\.1\.mlp\.experts.*"]
    config = compressed_config(
        "mixed-precision",
        ignore,
        group_0={
            "targets": ["re:.*self_attn.*"],
            "weights": fp8,
            "input_activations": static,
            "format": "float-quantized",
        },
        group_1={"targets": ["Linear"], "weights": int4, "format": "pack-quantized"},
    )
    in_fp8 = compressed_tensors("float-quantized", **fp8)
    in_int4 = compressed_tensors("pack-quantized", **int4)

    def with_scale(w: Tensor) -> Encoded:
        encoded, back = in_fp8(w)
        return encoded | {"input_scale": torch.tensor([0.5])}, back

    def how(module: str) -> Encode | None:
        if "layers.1.mlp.experts" in module:
            return None
        return with_scale if "self_attn" in module else in_int4

    hub, dense = write(tmp_path, how, config, by_name=True)
    model, expected = (load(folder, dtype="float32") for folder in (hub, dense))
    assert [moe.quantized for moe in moe_layers(model)] == [Int4, None]
    assert quantized_layers(model) == LAYERS
    assert isinstance(model.decoder.layers[1].attn.qkv.weight(), ChannelFp8)
    assert isinstance(model.decoder.layers[1].mlp.shared.down.weight(), Int4)
    round_inputs(expected, model)
    with torch.no_grad():
        assert distance(model(ids(2, 9)).logits, expected(ids(2, 9)).logits) < ROUNDED
    assert "8 static scales of activations not loaded" in caplog.text
    report = moezoo.inspect(hub)
    assert report.supported and report.stored_as is not None
    assert report.stored_as == (
        "int4_w4a16 in groups of 64: the experts of 1 of 2 MoE layers stay so, 8 weights of linear "
        "layers in fp8_w8a8 with a scale a matrix, 6 weights of linear layers in int4_w4a16 in "
        "groups of 64"
    )
    caplog.set_level(logging.INFO)
    load(hub)
    assert "8 weights of linear layers stay in fp8_w8a8 with a scale a matrix" in caplog.text
    assert "6 weights of linear layers stay in int4_w4a16 in groups of 64" in caplog.text
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", dtype="float32"), model)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_fp8_with_a_scale_a_matrix(tmp_path, static, caplog):
    config = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}

    def encode(w: Tensor) -> Encoded:
        scale = w.abs().max() / 448
        data = (w / scale).to(torch.float8_e4m3fn)
        encoded = {"weight": data, "weight_scale_inv": scale}
        if static:
            encoded |= {"activation_scale": torch.tensor(0.5)}
        return encoded, data.float() * scale

    hub, dense = write(tmp_path, encode, config)
    assert quantized_layers(check(hub, dense, ChannelFp8, exact=False)) == LAYERS
    missing = "activation_scheme is 'static', but the checkpoint has no scales of activations"
    assert missing not in caplog.text
    if static:
        ends = (".activation_scale",)
        for name in [name for name in load_file(hub / FILE) if name.endswith(ends)]:
            change(hub, lambda stored, name=name: stored.pop(name))
        load(hub)
        assert caplog.text.count(missing) == 1


def test_mxfp4_as_gpt_oss_has_it(tmp_path):
    """Blocks of stacked experts, gate and up rows in turn; transformers decodes the same bytes."""
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> tuple[Tensor, Tensor]:
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        return blocks, torch.randint(118, 136, shape, generator=generator, dtype=torch.uint8)

    stored: dict[str, Tensor] = {"router": torch.zeros(3, 128)}
    dense = {}
    for name, shape in (("gate_up_proj", (3, 128, 4)), ("down_proj", (3, 128, 2))):
        blocks, scales = numbers(*shape)
        stored |= {f"experts.{name}_blocks": blocks, f"experts.{name}_scales": scales}
        decoder = getattr(theirs, "_convert_moe_packed_tensors", None)
        if decoder is None:
            pytest.skip("this transformers has no decoder of mxfp4")
        dense[name] = decoder(blocks, scales, dtype=torch.float32)
    save_file(stored, tmp_path / FILE)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["router"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    view = ("transpose", "deinterleave")
    rules = [
        Rule("gate", "router"),
        Rule("w13", "experts.gate_up_proj", shard="expert", view=view),
        Rule("w2", "experts.down_proj", shard="expert", view="transpose"),
    ]
    for owned in (None, [2, 0]):
        with torch.device("meta"):
            moe = FusedMoE(128, 64, 3 if owned is None else 2, None)
        moe.gate = torch.nn.Parameter(torch.empty(3, 128, device="meta"))
        load_weights(
            moe,
            open_checkpoint(tmp_path),
            rules,
            device=torch.device("cpu"),
            dtype=torch.float32,
            experts=owned,
        )
        assert isinstance(moe.w13(), Mxfp4)
        rows = slice(None) if owned is None else owned
        up = dense["gate_up_proj"].transpose(1, 2)  # theirs is [E, H, 2I]
        expected = torch.stack((up[:, ::2], up[:, 1::2]), 1)
        assert moe.w13().dequantize().equal(expected[rows])
        assert moe.w2().dequantize().equal(dense["down_proj"].transpose(1, 2)[rows])


GATE = "model.layers.1.mlp.experts.3.gate_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s[f"{GATE}.scales"][1].fill_(torch.nan), ".scales in {f}: the scale at [1, 0]"),
        (lambda s: s[f"{GATE}.scales"][1, 2].fill_(0), "the scale at [1, 2] is 0.0; it must be"),
        (lambda s: s[f"{GATE}.qzeros"][1, 2].fill_(7), "though the config says sym"),
        (lambda s: s[f"{GATE}.g_idx"][5].fill_(3), "column [5] is in group 3, though"),
        (lambda s: s.pop(f"{GATE}.scales"), f"is int32 in {{f}} and there is no {GATE}.scales"),
        (lambda s: s.pop(f"{GATE}.qweight"), f"holds scales of {GATE}.qweight, which is not there"),
        (
            lambda s: s.update({f"{GATE}.scales": s[f"{GATE}.scales"][:4].clone()}),
            f"{GATE}.scales is [4, 128] in {{f}}, {GATE}.qweight [32, 128] takes [8, 128]",
        ),
        (
            lambda s: s.update({f"{GATE}.qweight": s[f"{GATE}.qweight"][:30].clone()}),
            f"{GATE}.g_idx is [256] in {{f}}, {GATE}.qweight [30, 128] takes [240] with the bits",
        ),
    ],
    ids=["nan", "zero", "zeros", "order", "no-scales", "alone", "scales-shape", "data-shape"],
)
def test_gptq_that_is_wrong(tmp_path, edit, message):
    hub, _ = write(tmp_path, gptq, gptq_config())
    change(hub, edit)
    with pytest.raises(QuantizationError) as caught:
        load(hub)
    assert str(caught.value).startswith(f"Quantization error: {hub}: {GATE}.")
    assert message.format(f=FILE) in str(caught.value)


def test_orders_with_groups_that_are_not_full(tmp_path):
    how = {"desc_act": True}
    hub, _ = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    change(hub, lambda stored: stored[f"{GATE}.g_idx"].zero_())
    with pytest.raises(QuantizationError, match=r"g_idx .* is in group 0; each has 32 of 256"):
        load(hub)


@pytest.mark.parametrize("ordered", [True, False], ids=["g_idx", "no g_idx"])
def test_gptq_that_says_awq(tmp_path, ordered):
    hub, _ = write(tmp_path, gptq, AWQ)
    message = "g_idx in model.safetensors is beside model.*qweight, as quant_method 'gptq' has them"
    if not ordered:
        for name in [name for name in load_file(hub / FILE) if name.endswith(".g_idx")]:
            change(hub, lambda stored, name=name: stored.pop(name))
        message = r"\.scales is \[\d+, \d+\] in model.safetensors, model.*qweight .* takes \["
        message += r"|qweight is \[\d+, \d+\] in model.safetensors, which is \d+ columns, but model"
    with pytest.raises(QuantizationError, match=message):
        load(hub)


def test_packed_weights_that_are_wrong(tmp_path):
    stored, weights, _ = COMPRESSED["int4"]
    scheme = {"targets": ["Linear"], "weights": weights}
    config = compressed_config(stored, ["lm_head", "re:.*gate$"], group_0=scheme)
    hub, _ = write(tmp_path, compressed_tensors(stored, **weights), config)
    before = load_file(hub / FILE)
    for edit, message in (
        (lambda s: s[f"{GATE}.weight_shape"][1].fill_(99), "dimension [1] is 99, though the data"),
        (lambda s: s[f"{GATE}.weight_scale"][7, 1].fill_(torch.inf), "the scale at [7, 1] is inf"),
        (
            lambda s: s.update(
                {f"{GATE}.weight_packed": s[f"{GATE}.weight_packed"].to(torch.int64)}
            ),
            "weight_packed is [128, 32] int64 in model.safetensors, expected a matrix of int32",
        ),
        (
            lambda s: s.update(
                {f"{GATE}.weight_packed": s[f"{GATE}.weight_packed"][:, 1:].clone()}
            ),
            f"{GATE}.weight_packed is [128, 31] in {FILE}, which is 248 columns, but "
            f"{GATE}.weight_scale [128, 8] in {FILE} has the scales of 8 groups of 32, which are "
            "256: one of them is cut off",
        ),
        (
            lambda s: s.update({f"{GATE}.weight_scale": s[f"{GATE}.weight_scale"][:, :3].clone()}),
            "weight_scale is [128, 3] in model.safetensors",
        ),
    ):
        save_file(before, hub / FILE)
        change(hub, edit)
        with pytest.raises(QuantizationError) as caught:
            load(hub)
        assert GATE in str(caught.value) and message in str(caught.value)
    save_file(before, hub / FILE)
    set_config(hub, quantization_config=config | {"ignore": [f"re:{GATE}"]})
    with pytest.raises(QuantizationError, match=r"says that re:.* is not quantised"):
        load(hub)


@pytest.mark.parametrize(
    "activations", [{"num_bits": 8, "type": "float", "dynamic": True}, {"num_bits": 8}], ids=str
)
@pytest.mark.parametrize("case", ["int8", "fp8-tensor"])
def test_activations_of_8_bits(tmp_path, case, activations, caplog):
    """Static ones have a scale for every module, which is not loaded but must be there."""
    stored, weights, kind = COMPRESSED[case]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = compressed_config(stored, ["lm_head", "re:.*gate$"], g=group)
    encode = compressed_tensors(stored, **weights)
    static = not activations.get("dynamic")

    def with_scale(w: Tensor) -> Encoded:
        encoded, back = encode(w)
        return encoded | {"input_scale": torch.tensor([0.5])}, back

    hub, _ = write(tmp_path / "a", with_scale if static else encode, config)
    assert moe_layers(load(hub))[0].quantized is kind
    told = (
        "activations beside integer or mxfp4 weights; here these are multiplied by" in caplog.text
    )
    assert told == (case == "int8")
    if static:
        none, _ = write(tmp_path / "b", encode, config)
        change(hub, lambda stored: stored.pop(f"{GATE}.input_scale"))
        for folder, module in ((hub, GATE), (none, r"model\.layers\.\S+")):
            message = rf"{module}\.weight is \w+ in {FILE} and there is no {module}\.input_scale, "
            message += (
                r"which its scheme .* input_activations\.dynamic is False; get the checkpoint"
            )
            with pytest.raises(QuantizationError, match=message):
                load(folder)
            assert ".input_scale" in moezoo.inspect(folder).reason


@pytest.mark.parametrize(
    ("encode", "config", "end"),
    [
        (lambda w: compressed_tensors("pack-quantized", **GROUPS_OF_32)(w), None, "weight_packed"),
        (gptq, gptq_config(), "qweight"),
        (awq, AWQ, "qweight"),
    ],
    ids=["compressed-tensors", "gptq", "awq"],
)
def test_a_weight_that_is_there_unquantised_too(tmp_path, encode, config, end):
    scheme = {"targets": ["Linear"], "weights": GROUPS_OF_32}
    config = config or compressed_config("pack-quantized", ["lm_head", "re:.*gate$"], g=scheme)
    hub, _ = write(tmp_path, encode, config)
    change(hub, lambda stored: stored.update({f"{GATE}.weight": torch.zeros(128, 128)}))
    message = rf"{GATE}\.{end} in {FILE} holds {GATE}\.weight, which is also in the checkpoint"
    with pytest.raises(QuantizationError, match=message):
        load(hub)


@pytest.mark.parametrize("how", [{}, {"desc_act": True, "sym": False}], ids=str)
def test_dequantized(tmp_path, how):
    """Linear layers and shared experts too."""
    hub, dense = write(tmp_path, partial(gptq, **how), gptq_config(**how))
    model, expected = (load(folder, dtype="float32") for folder in (hub, dense))
    assert quantized_layers(model) == LAYERS
    model.dequantize()
    assert quantized_layers(model) == set()
    assert_same(model, expected)
    with torch.no_grad():
        assert distance(model(ids(2, 9)).logits, expected(ids(2, 9)).logits) < EXACT


def test_a_file_that_is_cut_before_its_orders_are_read(tmp_path, monkeypatch):
    hub, _ = write(tmp_path, lambda w: gptq(w, desc_act=True), gptq_config(desc_act=True))
    path = hub / "model.safetensors"

    def cut(*args, **options):
        path.write_bytes(path.read_bytes()[:9000])
        return with_orders(*args, **options)

    monkeypatch.setattr("moezoo.loaders.weights.with_orders", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within \S+\.g_idx"):
        load(hub)


def test_zero_points_that_4_bits_do_not_have(tmp_path):
    weights = {"num_bits": 4, "strategy": "tensor", "symmetric": False}
    scheme = {"targets": ["Linear"], "weights": weights}
    config = compressed_config("pack-quantized", ["lm_head", "re:.*gate$"], g=scheme)
    hub, _ = write(tmp_path, compressed_tensors("pack-quantized", **weights), config)
    name = f"{GATE}.weight_zero_point"
    change(hub, lambda stored: stored[name].fill_(100))
    message = rf"{name} in {FILE}: the zero point at \[0\] is 100, it must be one of -8 to 7; get"
    with pytest.raises(QuantizationError, match=message):
        load(hub)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("method", ["fp8", "fp8-block", "mxfp4"])
def test_scales_of_bytes(tmp_path, method, dtype):
    """E8M0 as it is or as uint8: 0 is 2^-127, 255 is NaN."""
    end = "weight_scale" if method == "mxfp4" else "weight_scale_inv"
    weights = COMPRESSED["mxfp4"][1]
    config: dict[str, Any] = {"quant_method": "fp8"}
    if method == "mxfp4":
        scheme = {"targets": ["Linear"], "weights": weights}
        config = compressed_config("mxfp4-pack-quantized", ["lm_head", "re:.*gate$"], g=scheme)
    elif method == "fp8-block":
        config["weight_block_size"] = [128, 128]

    def encode(w: Tensor) -> Encoded:
        if method == "mxfp4":
            encoded, back = compressed_tensors("mxfp4-pack-quantized", **weights)(w)
        else:
            shape = [-(-size // 128) for size in w.shape] if method == "fp8-block" else [1]
            scale = torch.full(shape, 120, dtype=torch.uint8)
            encoded, back = {"weight": (w * 128).to(torch.float8_e4m3fn), end: scale}, w
        return encoded | {end: encoded[end].view(dtype)}, back

    hub, _ = write(tmp_path, encode, config)
    scale = f"{GATE}.{end}"

    def put(byte: int) -> None:
        change(hub, lambda stored: stored[scale].view(torch.uint8).view(-1)[0].fill_(byte))

    put(0)
    found = moe_layers(load(hub))[1].w13().scales[3, 0].flatten()[0]
    assert found.item() == (0 if method == "mxfp4" else 2.0**-127)
    put(255)
    with pytest.raises(QuantizationError, match=rf"{scale} .*the scale .* is (nan|255)[,;]"):
        load(hub)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gptq_config(bits=3), "bits is 3"),
        (gptq_config() | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (gptq_config() | {"format": "marlin"}, "format is 'marlin'"),
        (gptq_config() | {"is_marlin_format": True}, "is_marlin_format is True"),
        (gptq_config() | {"group_size": "x"}, "group_size is 'x'"),
        (gptq_config() | {"dynamic": {"+:.*": {"bits": 3}}}, "dynamic.+:.*.bits is 3"),
        (gptq_config() | {"dynamic": {".*": {"group_size": 0}}}, "dynamic..*.group_size is 0"),
        (
            gptq_config() | {"dynamic": {"a": {"adapter": {"r": 1}}}},
            "dynamic.a.adapter is {'r': 1}",
        ),
        (gptq_config() | {"dynamic": {"+:a": 8}}, "dynamic.+:a is 8; this release loads a table"),
        (gptq_config() | {"dynamic": {"-:([": {}}}, "dynamic.-:([ is {}; this release loads patt"),
        (gptq_config() | {"act_bits": 8}, "act_bits is 8"),
        (AWQ | {"act_bits": 8}, "act_bits is 8"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        (AWQ | {"format": "gemv_fast"}, "format is 'gemv_fast'"),
        (AWQ | {"desc_act": True}, "desc_act is True"),
        (AWQ | {"zero_point": False}, "zero_point is False"),
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
        ({"quant_method": ["gptq"]}, "quant_method is ['gptq']"),
        (gptq_config() | {"dynamic": 3}, "dynamic is 3"),
        ({"quant_method": "fp8", "modules_to_not_convert": 5}, "modules_to_not_convert is 5"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128"),
        ({"quant_method": "mxfp4", "scale_format": "e4m3"}, "scale_format is 'e4m3'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "format is 'nvfp4",
        ),
    ],
    ids=str,
)
def test_configs_that_are_not_done(tmp_path, config, message):
    plain("qwen2_moe").save_pretrained(tmp_path)
    set_config(tmp_path, quantization_config=config)
    with pytest.raises(QuantizationError) as caught:
        load(tmp_path)
    assert f"quantization_config.{message}" in str(caught.value)
    assert message in moezoo.inspect(tmp_path).reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 3}, "num_bits is 3"),
        (
            {"type": "float"},
            "type is 'float'; this release loads 'int' of 4 bits as 'pack-quantized'",
        ),
        ({"strategy": "tensor_group"}, "strategy is 'tensor_group'"),
        ({"dynamic": True}, "dynamic is True"),
        ({"group_size": 64.0}, "group_size is 64.0"),
        ({"strategy": "channel"}, "group_size is 32; this release loads none with strategy 'chan"),
        ({"targets": ["re:(["]}, "'re:([' is no pattern"),
        ({"targets": {}}, "targets is {}; this release loads a list of names"),
        (
            {"input_activations": {"num_bits": 4, "type": "float"}},
            "input_activations.num_bits is 4; this release loads 8",
        ),
        ({"input_activations": {"dynamic": "local"}}, "input_activations.dynamic is 'local'"),
        ({"input_activations": 8}, "input_activations is 8; this release loads a table"),
    ],
    ids=str,
)
def test_schemes_that_are_not_done(tmp_path, fields, message):
    plain("qwen2_moe").save_pretrained(tmp_path)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | fields
    of_the_group = {"targets", "input_activations", "format"}
    others = {name: weights.pop(name) for name in of_the_group & weights.keys()}
    group = {"targets": ["Linear"], "weights": weights} | others
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    set_config(tmp_path, quantization_config=config | {"config_groups": {"g": group}})
    with pytest.raises(QuantizationError) as caught:
        load(tmp_path)
    where = "quantization_config.config_groups.g."
    assert where in str(caught.value) and message in str(caught.value)


def test_fields_that_nobody_knows_are_told_once(tmp_path, caplog):
    known = {"lm_head": True, "meta": {"quantizer": ["gptqmodel:5.0.0"]}, "act_group_aware": True}
    known |= {"format": "gptq", "dataset": "c4", "pack_dtype": "int32", "static_groups": True}
    known |= {"act_bits": 16, "modules_in_block_to_quantize": [["self_attn.q_proj"]]}
    (tmp_path / "gptq").mkdir()
    hub, _ = write(tmp_path / "gptq", gptq, gptq_config() | known)
    load(hub)
    assert "not known" not in caplog.text
    set_config(hub, quantization_config=gptq_config() | {"new": {"a": 1}, "off": None})
    load(hub)
    assert caplog.text.count("quantization_config.new: not known to this release") == 1
    assert "off" not in caplog.text
    caplog.clear()

    stored, weights, _ = COMPRESSED["int8"]
    dynamic = {"num_bits": 8, "dynamic": True}
    config = compressed_config(
        stored,
        ["lm_head", "re:.*gate$"],
        g={"targets": ["Linear"], "weights": weights, "input_activations": dynamic},
    )
    known = {"version": "0.12.0", "global_compression_ratio": 1.5, "sparsity_config": {}}
    hub, _ = write(tmp_path / "ct", compressed_tensors(stored, **weights), config | known)
    load(hub)
    assert "not known" not in caplog.text
    config["config_groups"]["g"]["weights"]["new"] = 1
    set_config(hub, quantization_config=config)
    load(hub)
    assert caplog.text.count("quantization_config.config_groups.g.weights.new: not known") == 1


@pytest.mark.parametrize("config", [gptq_config(group_size=96), AWQ | {"group_size": 512}], ids=str)
def test_a_config_alone_whose_groups_do_not_divide(config):
    model = deepcopy(plain("qwen2_moe").config)
    model.quantization_config = config
    message = (
        rf"0\.\S+_proj\.weight has \d+ columns, .* in groups of {config['group_size']}; .* change"
    )
    with pytest.raises(QuantizationError, match=message):
        moezoo.from_config(model, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        AWQ,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
            },
        },
    ],
    ids=lambda config: config["quant_method"],
)
def test_an_odd_number_of_columns_with_a_scale_a_row(config):
    scheme = hub_scheme(config if "config_groups" in config else config | {"group_size": -1}, "m")
    assert scheme.kind("down.weight", 8, torch.bfloat16) == Kind.integers(
        *(Int4, -1, 8),
        **{"dtype": torch.bfloat16, "ordered": False, "zeros": config is AWQ},
    )
    message = r"down.weight has 7 columns, which is odd, and a scale a row; .* int8 takes any numb"
    with pytest.raises(QuantizationError, match=message) as caught:
        scheme.kind("down.weight", 7, torch.bfloat16)
    assert "group" not in str(caught.value)


def test_an_odd_number_of_stored_columns():
    stored = {"m.qweight": ((7, 2), torch.int32), "m.scales": ((1, 16), torch.float16)}
    stored["m.qzeros"] = ((1, 2), torch.int32)
    tensors = {
        name: StoredTensor(*of, file="a.safetensors", start=0) for name, of in stored.items()
    }
    message = r"m: m.qweight \[7, 2\] in a.safetensors has 7 columns, which is odd, and a scale a r"
    with pytest.raises(QuantizationError, match=message):
        encoding_of(AWQ | {"group_size": -1}, tensors, "m")


@pytest.mark.parametrize(
    ("fields", "quantised"),
    [
        ({"modules_to_not_convert": ["layers.1.mlp.experts"]}, [True, False]),
        ({"modules_to_not_convert": ["mlp.gate"]}, [True, True]),
        (
            {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["self_attn.o_proj"]]},
            [False] * 2,
        ),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts"]]}, [True, True]),
        ({"modules_in_block_to_quantize": None}, [True, True]),
        ({"dynamic": {r"-:.*layers\.1\..*": {}}}, [True, False]),
        ({"dynamic": {"-:layers": {}, "+:nowhere": {"bits": 8}}}, [True, True]),
    ],
    ids=str,
)
def test_a_gptq_config_alone_says_what_is_not_quantised(fields, quantised):
    config = AutoConfig.from_pretrained(ASSET, num_hidden_layers=2)
    config.quantization_config = gptq_config() | fields
    model = moezoo.from_config(config, device="cpu")
    assert [moe.quantized is Int4 for moe in moe_layers(model)] == quantised


def test_a_scale_a_row_and_a_group_as_wide_as_a_row_are_one_kind(tmp_path, caplog):
    """Parts of one layer in both are stacked as they are: q, k and v, and gate and up."""
    row: dict[str, Any] = {"num_bits": 4, "strategy": "channel"}
    group: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 256}
    names = r"re:.*\.(q_proj|v_proj|gate_proj)$"
    config = compressed_config(
        "pack-quantized",
        ["lm_head", "re:.*gate$"],
        a={"targets": [names], "weights": group},
        b={"targets": ["Linear"], "weights": row},
    )

    def how(module: str) -> Encode:
        of = group if module.endswith(("q_proj", "v_proj", "gate_proj")) else row
        return compressed_tensors("pack-quantized", **of)

    hub, dense = write(tmp_path, how, config, by_name=True)
    model = check(hub, dense, Int4)
    assert quantized_layers(model) == LAYERS
    assert "dequantised (parts" not in caplog.text
    assert moe_layers(model)[0].w13().scales.shape[-1] == 1


def test_what_the_scheme_says_is_not_there(tmp_path):
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}
    encode = compressed_tensors("pack-quantized", **weights, symmetric=False)
    scheme = {"targets": ["Linear"], "weights": weights}
    config = compressed_config("pack-quantized", ["lm_head"], g=scheme)
    hub, _ = write(tmp_path / "a", encode, config)
    message = (
        r"weight_zero_point in .* holds zero points, but the scheme of .* symmetric is True; get"
    )
    with pytest.raises(QuantizationError, match=message):
        load(hub)
    hub, _ = write(tmp_path / "b", lambda w: ordered_compressed_tensors(w, group_size=32), config)
    with pytest.raises(QuantizationError, match=r"weight_g_idx .* has no actorder 'group'"):
        load(hub)


def test_gptq_without_its_config(tmp_path):
    hub, _ = write(tmp_path, gptq, gptq_config())
    set_config(hub, quantization_config=None)
    reason = moezoo.inspect(hub).reason
    assert len(reason) < 1500 and reason.count("\n  ") <= 8
    assert (
        "It looks quantised (quant_method gptq or awq), which its config.json does not say"
        in reason
    )
    with pytest.raises(CheckpointError, match=r"get the config\.json with the quantization_config"):
        load(hub)


@pytest.mark.parametrize("config", [[], 5, "gptq"], ids=str)
def test_a_config_that_is_no_table(tmp_path, config):
    plain("qwen2_moe").save_pretrained(tmp_path)
    set_config(tmp_path, quantization_config=config)
    with pytest.raises(QuantizationError, match=r"expected a table; get the config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_as_they_were_loaded(tmp_path, bits):
    """GPTQ is written as compressed-tensors: the same bits come back."""
    how = {"desc_act": True, "sym": False, "group_size": 64, "bits": bits}
    hub, _ = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    model = load(hub)
    assert model.decoder.layers[0].attn.qkv.weight().order is not None
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *("desc_act-asym", "8-bit", "8-bit-desc_act-asym", "awq", "int4-zeros", "int8-zeros"),
        *("int8-unpacked-row-zeros", "fp8-tensor"),
    ],
)
def test_on_a_gpu_the_same_bits(tmp_path, case):
    if case == "awq":
        hub, _ = write(tmp_path, awq, AWQ)
    elif case in GPTQ_CASES:
        how = GPTQ_CASES[case]
        hub, _ = write(tmp_path, lambda w: gptq(w, **how), gptq_config(**how))
    else:
        stored, weights, _ = COMPRESSED[case]
        scheme = {"targets": ["Linear"], "weights": weights}
        config = compressed_config(stored, ["lm_head", "re:.*gate$"], group_0=scheme)
        hub, _ = write(tmp_path, compressed_tensors(stored, **weights), config)
    model, gpu = load(hub, dtype="float16"), load(hub, dtype="float16", device="cuda")
    logits = gpu(ids(2, 9).cuda()).logits.cpu().float()
    assert distance(logits, model(ids(2, 9)).logits.float()) < ACTIVATIONS
    # On the engine, whose steps are recorded.
    assert gpu.generate(ids(2, 9).cuda(), max_new_tokens=5, do_sample=False).shape == (2, 14)
    assert_same(gpu.cpu(), model)
    change(hub, lambda s: s[next(n for n in s if n.endswith(("scales", "_scale")))].fill_(0))
    with pytest.raises(QuantizationError, match=r"is 0\.0; it must be finite"):
        load(hub, device="cuda")

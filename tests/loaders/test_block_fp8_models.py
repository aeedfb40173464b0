"""Whole models with experts in block fp8: quantised while they load, from the hub's format, saved.

The oracles are transformers' own quantiser, which writes checkpoints here, and its reader, which
dequantises them on a CPU.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    ASSET,
    EXACT,
    MODELS,
    assert_same,
    change,
    distance,
    ids,
    load,
    moe_layers,
    plain,
    round_inputs,
    set_config,
    theirs,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedModel,
)
from written_module import write_weights

import moezoo
from moezoo import registry
from moezoo.errors import CheckpointError, QuantizationError
from moezoo.generation.keeper import fingerprint
from moezoo.layers.moe import FusedMoE, workspace_bytes
from moezoo.layers.moe.chunks import CHUNK_TOKENS
from moezoo.layers.quant import BlockFp8, QuantizedWeights
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.config import transformers_config
from moezoo.loaders.linears import linears_of
from moezoo.loaders.make import from_config
from moezoo.loaders.mapping import Rule
from moezoo.loaders.quantization import Quantization
from moezoo.loaders.weights import load_weights

HUB = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
ACTIVATIONS = 0.08
"""||difference|| / ||logits|| that activations quantised to 4 bits bring: each of two roundings in
a layer is off by 0.025 on average, and with random weights some tokens go to other experts (found:
0.016 with the trained model, up to 0.056 with random weights)."""


def dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with ordinary experts and linear layers."""
    model = copy.deepcopy(model)
    for moe in moe_layers(model):
        if moe.quantized:
            w13, w2 = moe.w13().dequantize(dtype).flatten(1, 2), moe.w2().dequantize(dtype)
            del moe.w13, moe.w2
            moe.w13 = nn.Parameter(w13, requires_grad=False)
            moe.w2 = nn.Parameter(w2, requires_grad=False)
    for layer in linears_of(model.decoder).values():
        if isinstance(layer.weight, QuantizedWeights):
            w = layer.weight().dequantize(dtype)
            del layer.weight
            layer.weight = nn.Parameter(w, requires_grad=False)
    return model


def write_fp8(
    model_type: str, folder: Path, *, scale_fmt: str = "float", stacked: bool = False
) -> Path:
    """A checkpoint whose linear layers transformers' own quantiser has quantised, as on the hub."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model = plain(model_type)
    model.save_pretrained(folder, save_original_format=not stacked)
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    op = fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    kept = ("embed_tokens.weight", "lm_head.weight", "norm.weight", ".gate.weight", "_gate.weight")

    def quantize(stored: dict[str, Tensor]) -> None:
        for name in list(stored):
            if not name.endswith(kept):
                stored |= op.convert({name: stored[name]})

    change(folder, quantize)
    skipped = sorted(
        name.removesuffix(".weight")
        for name in load_file(folder / "model.safetensors")
        if name.endswith(kept) and "norm" not in name
    )
    set_config(
        folder,
        quantization_config=HUB | {"scale_fmt": scale_fmt, "modules_to_not_convert": skipped},
    )
    return folder


class TestOnTheFly:
    @pytest.mark.parametrize("stacked", [False, True], ids=["per-expert", "stacked"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("model_type", MODELS)
    def test_experts_are_quantised_from_what_is_stored(self, tmp_path, model_type, dtype, stacked):
        plain(model_type).save_pretrained(tmp_path, save_original_format=not stacked)
        model = load(tmp_path, quantization="fp8_w8a8", dtype=dtype)
        whole, same = load(tmp_path, dtype=torch.float32), load(tmp_path, dtype=dtype)
        for moe, full in zip(moe_layers(model), moe_layers(whole), strict=True):
            for found, w in ((moe.w13(), full.w13.unflatten(1, (2, -1))), (moe.w2(), full.w2)):
                expected = BlockFp8.quantize(w.detach())
                assert found.data.view(torch.uint8).equal(expected.data.view(torch.uint8))
                assert found.scales.equal(expected.scales)
        state, others = model.state_dict(), same.state_dict()
        rest = state.keys() & others.keys()
        assert len(rest) == len(others) - 2 * len(moe_layers(model))
        assert all(state[name].equal(others[name]) for name in rest)
        assert {state[name].dtype for name in rest} <= {dtype, torch.float32}

    def test_large_matrices_are_cut_at_blocks(self, tmp_path, monkeypatch):
        """A piece of more than one block of rows, and a last one that is smaller."""
        monkeypatch.setattr("moezoo.loaders.stream._PUT_BATCH", 2 * 128 * 256 * 4)
        plain("mixtral").save_pretrained(tmp_path)
        model = load(tmp_path, quantization="fp8_w8a8")
        full = moe_layers(load(tmp_path))[0].w13.detach().unflatten(1, (2, -1))
        assert moe_layers(model)[0].w13().dequantize().equal(BlockFp8.quantize(full).dequantize())

    def test_every_way_to_ask_is_the_same(self):
        block = {"type": "fp8_w8a8", "block_size": [128, 128]}
        shape = {"type": "fp8_w8a8", "block_shape": (128, 128), "granularity": "block"}
        models = [
            load(ASSET, quantization=asked)
            for asked in ("fp8_w8a8", block, shape, moezoo.Quantization("fp8_w8a8"))
        ]
        for model in models[1:]:
            assert_same(model, models[0])

    def test_loss_of_a_trained_model(self):
        """Expert width 64: blocks are cut at the edges of gate, up and w2's columns."""
        text = (
            "Once upon a time there was a little dog who lived in a house near the forest. Every "
            "morning the dog ran to the river to see his friend, the old fish. One day the fish "
            "was not there. The dog was sad and sat down on a stone. Then a small bird came and "
            "said: Do not cry, the fish has gone to visit his brother. He will be back tomorrow. "
            "The dog thanked the bird, and they played together until the sun went down."
        )
        tokenizer = AutoTokenizer.from_pretrained(ASSET)
        losses = [
            math.log(next(iter(moezoo.score(load(ASSET, **how), tokenizer, [text]))).perplexity)
            for how in ({}, {"quantization": "fp8_w8a8"})
        ]
        assert losses[0] < 4
        assert abs(losses[1] - losses[0]) < 0.02

    def test_random_weights(self):
        config = AutoConfig.from_pretrained(ASSET)
        torch.manual_seed(0)
        model = from_config(config, device="cpu", quantization="fp8_w8a8")
        assert model.dtype == torch.bfloat16
        assert not hasattr(config, "quantization_config")
        for moe in moe_layers(model):
            assert abs(moe.w13().dequantize().std() / config.initializer_range - 1) < 0.05
        torch.manual_seed(0)
        assert_same(from_config(model.config, device="cpu"), model)  # its config says so
        skipped = ["model.layers.2.mlp.experts"]
        model.config.quantization_config = HUB | {"modules_to_not_convert": skipped}
        mixed = from_config(model.config, device="cpu")
        assert [bool(moe.quantized) for moe in moe_layers(mixed)] == [n != 2 for n in range(6)]
        assert model(ids(1, 5)).logits.isfinite().all() and mixed(ids(1, 5)).logits.isfinite().all()

    def test_weights_that_are_not_finite_are_named(self, tmp_path):
        plain("mixtral").save_pretrained(tmp_path)
        name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
        change(tmp_path, lambda stored: stored[name][130].fill_(torch.inf))
        with pytest.raises(QuantizationError) as caught:
            load(tmp_path, quantization="fp8_w8a8")
        assert f"{name} in model.safetensors: the weights of block [1, 0]" in str(caught.value)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load(ASSET, quantization="fp8_w8a8")


class TestInAModel:
    def test_parameters(self, model):
        state = model.state_dict()
        assert state["decoder.layers.0.mlp.w13.data"].shape == (16, 2, 64, 256)
        assert state["decoder.layers.0.mlp.w13.scales"].shape == (16, 2, 1, 2)
        assert state["decoder.layers.0.mlp.w2.data"].dtype == torch.float8_e4m3fn
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert "QuantizedWeights([16, 2, 64, 256], fp8_w8a8)" in repr(model)
        assert "H=256, I=64, E=16, silu" in repr(model)
        other = load(ASSET, quantization="fp8_w8a8")
        with torch.no_grad():
            other.decoder.layers[0].mlp.w2.scales.mul_(2)
        other.load_state_dict(state)
        assert_same(other, model)

    def test_needs_no_no_grad(self, model):
        with torch.no_grad():
            expected = model(ids(1, 4)).logits
        assert model(ids(1, 4)).logits.equal(expected)

    def test_a_cast_leaves_the_experts(self, model):
        cast = copy.deepcopy(model).to(torch.float16)
        assert cast.dtype == torch.float16
        for moe, before in zip(moe_layers(cast), moe_layers(model), strict=True):
            assert moe.gate.dtype == torch.float16
            assert_same(moe.w13, before.w13)
            assert_same(moe.w2, before.w2)
        assert distance(cast(ids(1, 9)).logits.float(), model(ids(1, 9)).logits.float()) < 0.02
        moved = copy.deepcopy(model).to("meta")
        assert all(parameter.is_meta for parameter in moved.parameters())

    def test_a_copy_is_its_own(self, model):
        twin = copy.deepcopy(model)
        assert_same(twin, model)
        before = fingerprint(twin.decoder)
        assert before != fingerprint(model.decoder)
        moe = moe_layers(twin)[0]
        moe.w13.scales = nn.Parameter(moe.w13.scales.clone(), requires_grad=False)
        assert fingerprint(twin.decoder) != before

    def test_generates(self, model):
        prompt, greedy = ids(2, 6), {"max_new_tokens": 6, "do_sample": False}
        tokens = model.generate(prompt, **greedy)
        looped = model.generate(prompt, **greedy, num_beams=1, prefill_chunk_size=4)
        assert tokens.shape == (2, 12) and tokens.equal(looped)

    def test_quantised_experts_are_not_reset(self, model):
        with pytest.raises(ValueError, match="not reset"):
            moe_layers(model)[0].reset_parameters()

    @pytest.mark.gpu
    def test_on_a_gpu(self, model):
        gpu = load(ASSET, quantization="fp8_w8a8", device="cuda")
        assert_same(copy.deepcopy(gpu).cpu(), model)
        moved = copy.deepcopy(model).cuda()
        assert_same(moved, gpu)
        tokens = ids(3, 40)
        ours = gpu(tokens.cuda()).logits.cpu().float()
        assert distance(ours, model(tokens).logits.float()) < ACTIVATIONS
        assert gpu.generate(tokens.cuda(), max_new_tokens=8).shape[1] > 40


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory) -> Path:
    return write_fp8(request.param, tmp_path_factory.mktemp(request.param))


class TestFromTheHub:
    def test_weights_are_those_that_transformers_reads(self, folder, tmp_path):
        """Experts and linear layers stay as stored, or are dequantised: bit for bit in fp32."""
        model = load(folder, dtype=torch.float32)
        linear = linears_of(model.decoder).items()
        fp8 = {name for name, layer in linear if isinstance(layer.weight, QuantizedWeights)}
        kept = ("gate.weight", "lm_head.weight", "kv_a.weight")  # its 160 rows are not blocks here
        assert fp8 == {name for name, _ in linear if not name.endswith(kept)}
        assert moe_layers(model) and all(moe.quantized for moe in moe_layers(model))
        reference = theirs(folder)
        full = dequantized(model, torch.float32)
        full.save_pretrained(tmp_path)
        again = theirs(tmp_path).state_dict()
        assert again.keys() == reference.state_dict().keys()
        for name, tensor in reference.state_dict().items():
            assert tensor.equal(again[name]), name
        tokens = ids(3, 13)
        with torch.no_grad():
            expected = reference(tokens).logits
            assert distance(full(tokens).logits, expected) < EXACT
            logits = model(tokens).logits
        experts = load(folder, dtype=torch.float32, quantization={"dense": "dequantize"})
        assert_same(dequantized(experts, torch.float32), full)
        with torch.no_grad():
            assert 10 * EXACT < distance(experts(tokens).logits, expected) < ACTIVATIONS
            round_inputs(experts, model)
            assert distance(logits, experts(tokens).logits) < EXACT

    def test_dtype_is_the_configs_and_not_that_of_scales(self, folder, tmp_path):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("dtype")
        (tmp_path / "config.json").write_text(json.dumps(config))
        change(tmp_path, lambda stored: stored.update(_sixteen_bit(stored)))
        model = load(tmp_path)
        assert model.dtype == torch.bfloat16
        assert model.decoder.embed.weight.dtype == torch.bfloat16

    def test_saved_as_it_is(self, folder, tmp_path):
        model = load(folder)
        model.save_pretrained(tmp_path)
        assert_same(load(tmp_path), model)
        stored, written = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
        experts = [name for name in stored if ".experts." in name]
        assert len(experts) % 6 == 0
        # One matrix of latent attention is dequantised.
        for name in [n for n in stored if n.endswith("_scale_inv") and "kv_b" not in n]:
            assert written[name].equal(stored[name]), name
            name = name.removesuffix("_scale_inv")
            assert written[name].dtype == stored[name].dtype
            assert written[name].view(torch.uint8).equal(stored[name].view(torch.uint8)), name

    def test_inspect(self, folder, tmp_path):
        report = moezoo.inspect(folder)
        assert report.supported, report.reason
        layers = len(moe_layers(load(folder)))
        assert f"the experts of {layers} of {layers} MoE layers stay so" in report.stored_as
        plain(report.model_type).save_pretrained(tmp_path)
        unquantised = moezoo.inspect(tmp_path)
        assert unquantised.stored_as is None
        for name in ("parameters", "active_parameters", "dtype"):
            assert getattr(report, name) == getattr(unquantised, name), name
        as_stored, *others = report.weight_bytes.items()
        assert others == list(unquantised.weight_bytes.items())
        held = sum(tensor.nbytes for tensor in load(folder).decoder.parameters())
        assert as_stored[0] == "as stored" and as_stored[1][1] == held
        experts = report.experts
        sizes = {"intermediate_size": experts.intermediate_size, "element_size": 4}
        needed = workspace_bytes(
            CHUNK_TOKENS, experts.per_token, report.hidden_size, weights=BlockFp8, **sizes
        )
        expected = replace(unquantised.experts, workspace_bytes=needed, formats=(BlockFp8.name,))
        assert experts == expected
        assert needed != unquantised.experts.workspace_bytes
        assert 0 < report.expert_bytes_on_disk < unquantised.expert_bytes_on_disk / 3.9

    def test_asking_for_the_same_changes_nothing(self, folder):
        assert_same(load(folder, quantization="fp8_w8a8"), load(folder))
        with pytest.raises(QuantizationError, match=r"in fp8_w8a8 already, .* in mxfp4"):
            load(folder, quantization="mxfp4")


def _sixteen_bit(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.to(torch.bfloat16)
        for name, tensor in stored.items()
        if tensor.dtype == torch.float32 and not name.endswith("scale_inv")
    }


@pytest.mark.parametrize("as_bytes", [False, True], ids=["e8m0", "uint8"])
def test_scales_that_are_powers_of_two(tmp_path, as_bytes):
    write_fp8("qwen3_moe", tmp_path, scale_fmt="ue8m0")
    stored = load_file(tmp_path / "model.safetensors")
    scales = {name: t for name, t in stored.items() if name.endswith("scale_inv")}
    assert {tensor.dtype for tensor in scales.values()} == {torch.float8_e8m0fnu}
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    q = "model.layers.1.mlp.down_proj.weight"
    if as_bytes:
        change(tmp_path, lambda s: s.update({n: t.view(torch.uint8) for n, t in scales.items()}))
    model = load(tmp_path)
    found = moe_layers(model)[0].w2()
    assert found.scales.dtype == torch.float32
    assert found.scales[3].equal(scales[f"{name}_scale_inv"].float())
    assert found.data[3].view(torch.uint8).equal(stored[name].view(torch.uint8))
    assert model.decoder.layers[1].mlp.down.weight().dequantize().equal(decoded(stored, q))


def decoded(stored: dict[str, Tensor], name: str) -> Tensor:
    """An independent decoder: every element times the scale of its block, in fp32."""
    w = stored[name].float()
    scales = stored[f"{name}_scale_inv"].float()
    rows, columns = torch.arange(w.shape[-2]) // 128, torch.arange(w.shape[-1]) // 128
    return w * scales[..., rows[:, None], columns]


def test_stacked_experts(tmp_path):
    write_fp8("qwen3_moe", tmp_path, stacked=True)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"
    assert f"{prefix}.gate_up_proj_scale_inv" in stored
    moe = moe_layers(load(tmp_path))[0]
    assert moe.quantized
    expected = decoded(stored, f"{prefix}.gate_up_proj")
    assert moe.w13().dequantize().flatten(1, 2).equal(expected)
    assert moe.w2().dequantize().equal(decoded(stored, f"{prefix}.down_proj"))


def cut_blocks_checkpoint(folder: Path, *, stacked: bool = False, layers: int = 6) -> Path:
    """The trained model, of expert width 64, in fp8 written by hand in the first `layers`."""
    if stacked:
        config = AutoConfig.from_pretrained(ASSET)
        AutoModelForCausalLM.from_pretrained(ASSET, config=config).save_pretrained(
            folder, save_original_format=False
        )
    else:
        load(ASSET).save_pretrained(folder)

    def quantize(stored: dict[str, Tensor]) -> None:
        for name in [n for n in stored if ".experts." in n and int(n.split(".")[2]) < layers]:
            quantized = BlockFp8.quantize(stored[name])
            stored |= {name: quantized.data, f"{name}_scale_inv": quantized.scales}

    change(folder, quantize)
    set_config(folder, quantization_config=HUB)
    return folder


def test_blocks_that_do_not_divide(tmp_path):
    model = load(cut_blocks_checkpoint(tmp_path))
    assert_same(model, load(ASSET, quantization="fp8_w8a8"))


def test_blocks_that_gate_and_up_share_are_dequantised(tmp_path, caplog):
    cut_blocks_checkpoint(tmp_path, stacked=True)
    stored = load_file(tmp_path / "model.safetensors")
    moe = moe_layers(load(tmp_path))[3]
    assert not moe.quantized
    name = "model.layers.3.mlp.experts.gate_up_proj"
    assert moe.w13.equal(decoded(stored, name).to(torch.bfloat16))
    start = "model.layers.*.mlp.experts.gate_up_proj: 6 dequantised"
    assert any(message.startswith(start) for message in caplog.messages)
    assert "12 quantised weights are dequantised when" in moezoo.inspect(tmp_path).stored_as


def test_layers_that_are_not_quantised_stay_so(tmp_path):
    """And are saved so; other readers learn it from the config."""
    cut_blocks_checkpoint(tmp_path / "m", layers=2)
    kept = [f"model.layers.{n}.mlp.experts" for n in range(2, 6)]
    set_config(tmp_path / "m", quantization_config=HUB | {"modules_to_not_convert": kept})
    for asked in (None, "fp8_w8a8"):
        model = load(tmp_path / "m", quantization=asked)
        assert [bool(moe.quantized) for moe in moe_layers(model)] == [True] * 2 + [False] * 4
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert set(kept) <= set(written["modules_to_not_convert"])
    assert "model.layers.1.mlp.experts" not in written["modules_to_not_convert"]


def test_a_layer_in_fp8_in_part_is_dequantised(tmp_path):
    cut_blocks_checkpoint(tmp_path)
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    stored = load_file(tmp_path / "model.safetensors")
    full = decoded(stored, name).to(torch.bfloat16)

    def dequantize(stored: dict[str, Tensor]) -> None:
        stored[name] = full
        del stored[f"{name}_scale_inv"]

    change(tmp_path, dequantize)
    model = load(tmp_path)
    assert [bool(moe.quantized) for moe in moe_layers(model)] == [n != 2 for n in range(6)]
    expected = dequantized(load(ASSET, quantization="fp8_w8a8"), torch.bfloat16)
    assert moe_layers(model)[2].w13.equal(moe_layers(expected)[2].w13)


def test_transformers_reads_what_is_saved(tmp_path):
    model = load(ASSET, quantization="fp8_w8a8")
    model.save_pretrained(tmp_path / "fp8")
    assert_same(load(tmp_path / "fp8"), model)
    dequantized(model, torch.float32).float().save_pretrained(tmp_path / "plain")
    expected = theirs(tmp_path / "plain").state_dict()
    for name, tensor in theirs(tmp_path / "fp8").state_dict().items():
        assert tensor.equal(expected[name]), name


def test_a_dequantised_copy_is_saved_as_plain(tmp_path):
    dequantized(load(ASSET, quantization="fp8_w8a8"), torch.bfloat16).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(moe.quantized for moe in moe_layers(load(tmp_path)))


GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
SCALE = f"{GATE}_scale_inv"
FILE = "model.safetensors"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop(SCALE), f"{GATE} is float8_e4m3fn in {FILE} and there is no {SCALE}"),
        (lambda s: s.pop(GATE), f"{SCALE} in {FILE} holds scales of {GATE}, which is not there"),
        (
            lambda s: s.update({GATE: s[GATE].to(torch.bfloat16)}),
            f"{SCALE} in {FILE} holds scales of {GATE}, which is bfloat16",
        ),
        (
            lambda s: s.update({SCALE: s[SCALE][:, :1].clone()}),
            f"{SCALE} is [1, 1] in {FILE}, {GATE} [64, 256] takes [1, 2]",
        ),
        (
            lambda s: s.update({SCALE: s[SCALE].int()}),
            f"{SCALE} is int32 in {FILE}, expected float32 or float8_e8m0fnu",
        ),
    ],
    ids=["no-scale", "no-weight", "weight-not-fp8", "scale-shape", "scale-dtype"],
)
def test_headers_that_contradict(tmp_path, monkeypatch, edit, message):
    cut_blocks_checkpoint(tmp_path)
    change(tmp_path, edit)
    monkeypatch.setattr("os.preadv", None)  # no weight is read
    with pytest.raises(QuantizationError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"Quantization error: {tmp_path}: ")
    assert message in str(caught.value)
    report = moezoo.inspect(tmp_path)
    assert not report.supported and message in report.reason


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("dense", [False, True], ids=["experts", "dense"])
def test_scales_that_cannot_be(tmp_path, value, dense):
    write_fp8("mixtral", tmp_path)
    layer = "model.layers.1"
    name = f"{layer}.block_sparse_moe.experts.2.w3.weight_scale_inv"
    if dense:
        name = f"{layer}.self_attn.q_proj.weight_scale_inv"
    change(tmp_path, lambda stored: stored[name][1].fill_(value))
    with pytest.raises(QuantizationError) as caught:
        load(tmp_path)
    assert f"{name} in {FILE}: the scale of block [1, 0] is {value}" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "quark"}, "quant_method is 'quark'"),
        ({"quant_method": None}, "quant_method is None"),
        ({"weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"),
        ({"activation_scheme": "local"}, "activation_scheme is 'local'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"scale_fmt": "int"}, "scale_fmt is 'int'"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({"kv_cache_scheme": {"bits": 8}}, "kv_cache_scheme is {'bits': 8}"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"weight_scale_transposed": True}, "weight_scale_transposed is True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_not_done(tmp_path, fields, message):
    load(ASSET).save_pretrained(tmp_path)
    set_config(tmp_path, quantization_config=HUB | fields)
    config = AutoConfig.from_pretrained(ASSET)
    config.quantization_config = HUB | fields
    for call in (lambda: load(tmp_path), lambda: from_config(config, device="cpu")):
        with pytest.raises(QuantizationError) as caught:
            call()
        assert f"quantization_config.{message}" in str(caught.value)
    assert message in moezoo.inspect(tmp_path).reason


def test_a_module_that_is_not_converted_but_is(tmp_path):
    cut_blocks_checkpoint(tmp_path)
    for field in ("modules_to_not_convert", "ignored_layers"):
        kept = {field: ["model.layers.1.mlp", "model.layers.1.mlp.experts.1"]}
        set_config(tmp_path, quantization_config=HUB | kept)
        with pytest.raises(QuantizationError) as caught:
            load(tmp_path)
        assert "says that model.layers.1.mlp is not quantised" in str(caught.value)
        assert "is float8_e4m3fn in model.safetensors" in str(caught.value)


def test_fp8_that_the_config_does_not_tell(tmp_path):
    cut_blocks_checkpoint(tmp_path)
    set_config(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"its config\.json does not say"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("fp8", ValueError, "quantization type is 'fp8', expected one of 'fp8_w8a8'"),
        ({"type": "fp8_w8a8", "granularity": "row"}, ValueError, "granularity is 'row'"),
        ({"type": "fp8_w8a8", "block_size": 128}, ValueError, "block_size is 128"),
        ({"type": "fp8_w8a8", "block_size": [64, 64]}, ValueError, "block_size is [64, 64]"),
        ({"type": "fp8_w8a8", "group_size": 128}, ValueError, "group_size=128 is not for fp8"),
        ({"type": "fp8_w8a8", "blocks": 1}, ValueError, "unknown key 'blocks'"),
        ({"block_size": [128, 128]}, ValueError, "has no 'type'"),
        ({}, ValueError, "has no 'type'"),
        (
            {"type": "fp8_w8a8", "block_size": [128, 128], "block_shape": [128, 128]},
            ValueError,
            "give one",
        ),
        (8, ValueError, "quantization is 8, expected None, a name"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(asked, error, message):
    for call in (
        lambda: load(ASSET, quantization=asked),
        lambda: from_config(AutoConfig.from_pretrained(ASSET), quantization=asked),
        lambda: Quantization.of(asked),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize("stored_fp8", [False, True], ids=["on-the-fly", "hub"])
@pytest.mark.parametrize("stacked", [False, True], ids=["per-expert", "stacked"])
@pytest.mark.parametrize("owned", [[0, 1], [3, 0, 2]], ids=str)
def test_a_rank_gets_its_experts(tmp_path, owned, stacked, stored_fp8):
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(4, 2, 128, 256, generator=generator)
    w2 = torch.randn(4, 256, 128, generator=generator)
    if stacked:
        stored = {"m.gate_up": w13.flatten(1, 2), "m.down": w2}
        rules = [Rule("w13", "m.gate_up", shard="expert"), Rule("w2", "m.down", shard="expert")]
    else:
        parts = {f"m.{e}.{n}": w13[e, i].clone() for e in range(4) for i, n in enumerate("gu")}
        stored = parts | {f"m.{e}.d": w2[e].clone() for e in range(4)}
        rules = [
            Rule("w13", "m.{E}.g", "m.{E}.u", shard="expert"),
            Rule("w2", "m.{E}.d", shard="expert"),
        ]
    config = {"model_type": "toy"}
    if stored_fp8:
        for name in list(stored):
            quantized = BlockFp8.quantize(stored[name])
            stored |= {name: quantized.data, f"{name}_scale_inv": quantized.scales}
        config["quantization_config"] = HUB
    save_file(stored | {"gate": torch.zeros(4, 256)}, tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        moe = FusedMoE(256, 128, len(owned), None)
        moe.gate = nn.Parameter(torch.empty(4, 256))
    load_weights(
        moe,
        open_checkpoint(tmp_path),
        [Rule("gate", "gate"), *rules],
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        experts=owned,
        quantization=Quantization("fp8_w8a8"),
    )
    assert moe.w13().dequantize().equal(BlockFp8.quantize(w13).dequantize()[owned])
    assert moe.w2().dequantize().equal(BlockFp8.quantize(w2).dequantize()[owned])


def test_what_cannot_be_written(tmp_path):
    with torch.device("meta"):
        moe = FusedMoE(256, 128, 2, None)
    rules = [
        Rule("gate", "gate"),
        Rule("w13", "up", shard="expert", view="transpose"),
        Rule("w2", "down", shard="expert"),
    ]
    w13, w2 = torch.zeros(2, 2, 128, 256), torch.zeros(2, 256, 128)
    moe.quantize_(BlockFp8.quantize(w13), BlockFp8.quantize(w2))
    with pytest.raises(QuantizationError, match="up cannot be written"):
        write_weights(moe, rules, tmp_path)
    with pytest.raises(ValueError, match=r"w13 and w2 must be \[2, 2, 128, 256\]"):
        moe.quantize_(moe.w2(), moe.w2())


def test_transformers_config_object(tmp_path):
    config = AutoConfig.from_pretrained(ASSET)
    config.quantization_config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
    assert all(moe.quantized for moe in moe_layers(from_config(config, device="cpu")))


def test_compiles(model):
    moe = moe_layers(model)[0]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    assert compiled(x).equal(moe(x))


def test_a_failed_load_leaves_the_module_as_it_was(tmp_path):
    load(ASSET).save_pretrained(tmp_path)
    name = "model.layers.5.mlp.experts.0.up_proj.weight"
    change(tmp_path, lambda stored: stored[name][3].fill_(torch.nan))
    checkpoint = open_checkpoint(tmp_path)
    config = transformers_config(checkpoint)
    with torch.device("meta"):
        decoder = registry.build(config)
    with pytest.raises(QuantizationError, match=name):
        load_weights(
            decoder,
            checkpoint,
            registry.architecture(config.model_type).CHECKPOINT,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            quantization=Quantization("fp8_w8a8"),
        )
    assert not any(moe.quantized for moe in moe_layers(decoder))
    assert all(parameter.is_meta for parameter in decoder.parameters())

"""gpt-oss quantised: checkpoints in MXFP4 as on the hub, and experts quantised while they load."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import GPT_OSS, reference
from safetensors.torch import load_file, save_file
from test_oracle import assert_close, change_config, load, padded, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

import moezoo
from moezoo.generation.continuous import Batcher, Request
from moezoo.generation.engine import Engine
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4
from moezoo.loaders.checkpoint import open_checkpoint
from moezoo.loaders.convert import convert
from moezoo.loaders.weights import load_weights
from moezoo.models.gpt_oss import CHECKPOINT
from moezoo.registry import build

CONFIG = GPT_OSS | {"hidden_size": 64, "intermediate_size": 96}
FILE = "model.safetensors"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
RELEASED = {
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
    "experts_per_token": 2,
    "initial_context_length": 24,
    "swiglu_limit": 7.0,
}
"""What the config.json of the releases has beside transformers' own fields."""

ON_THE_FLY: dict[str, tuple[Any, type[Format]]] = {
    "fp8": ("fp8_w8a8", BlockFp8),
    "fp8-channel": ({"type": "fp8_w8a8", "granularity": "channel"}, ChannelFp8),
    "int8": ("int8_w8a16", Int8),
    "int4": ({"type": "int4_w4a16", "group_size": 32, "symmetric": False}, Int4),
    "mxfp4": ("mxfp4", Mxfp4),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [.., G, 16], scales uint8 [.., G] -> fp32 [.., 32 G], number by number."""
    values = [
        (-1.0) ** (code >> 3) * E2M1[code & 7] * 2.0 ** (exponent - 127)
        for block, exponent in zip(
            blocks.view(-1, 16).tolist(), scales.flatten().tolist(), strict=True
        )
        for byte in block
        for code in (byte & 15, byte >> 4)
    ]
    return torch.tensor(values).view(*scales.shape[:-1], -1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    reference("gpt_oss", CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A checkpoint as the releases are, and transformers' model with the decoded weights."""
    theirs = reference("gpt_oss", CONFIG, seed=1)
    folder = tmp_path_factory.mktemp("hub")
    theirs.save_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    stored = load_file(folder / FILE)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = stored.pop(name).shape
        shape = (num_experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        theirs.get_parameter(name).data.copy_(decoded(blocks, scales).transpose(1, 2))
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    change_config(folder, **RELEASED)
    return folder, theirs


def moe_layers(model: nn.Module) -> list[FusedMoE]:
    return [module for module in model.modules() if isinstance(module, FusedMoE)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_releases_run_in_mxfp4(hub: tuple[Path, PreTrainedModel], device: str) -> None:
    folder, theirs = hub
    model = load(folder, device=device)
    assert {moe.quantized for moe in moe_layers(model)} == {Mxfp4}
    inputs = padded("left")
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    kept = inputs["attention_mask"].bool()
    with torch.inference_mode():
        assert_close(model(**on_device).logits.cpu()[kept], theirs(**inputs).logits[kept])
        one = token_ids(1, 1)
        assert_close(model(one.to(device)).logits.cpu(), theirs(one).logits)
    for options in ({"max_new_tokens": 12}, {"max_new_tokens": 5, "num_beams": 3}):
        options |= {"do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(**inputs, **options)
        assert model.generate(**on_device, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_beyond_the_window(hub: tuple[Path, PreTrainedModel], device: str) -> None:
    folder, theirs = hub
    model = load(folder, device=device)
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (5, 1, 31, 18)]
    requests = [Request(i, ids, 9) for i, ids in enumerate(prompts)]
    engine = Engine(model.decoder, num_rows=3, context=64, chunk=7)
    finished = {
        r.index: r.tokens for r in Batcher(engine, engine.greedy, ends=set()).run(iter(requests))
    }
    for i, ids in enumerate(prompts):
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
        assert finished[i] == expected[0, len(ids) :].tolist()


@pytest.mark.gpu
def test_sixteen_bits_on_a_gpu(hub: tuple[Path, PreTrainedModel]) -> None:
    folder, theirs = hub
    model = load(folder, device="cuda", dtype=torch.bfloat16)
    ids = token_ids(4, 30)
    with torch.inference_mode():
        ours, exact = model(ids.cuda()).logits.float().cpu(), theirs(ids).logits
    differences = (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert differences.median() < 0.06


def test_the_releases_are_written_as_they_were(
    hub: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, theirs = hub
    load(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / FILE), load_file(tmp_path / FILE)
    assert before.keys() == after.keys()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())
    read, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=Mxfp4Config(dequantize=True),
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    ids = token_ids(2, 9)
    with torch.inference_mode():
        assert_close(read.eval().float()(ids).logits, theirs(ids).logits)


def test_dequantised_to_sixteen_bits_elsewhere(
    hub: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """MXFP4's numbers are those of bf16, in which others store them."""
    folder, theirs = hub
    theirs.save_pretrained(tmp_path)
    ids = token_ids(2, 9)
    with torch.inference_mode():
        assert_close(load(folder)(ids).logits, load(tmp_path)(ids).logits)


def test_recorded_choices(hub: tuple[Path, PreTrainedModel]) -> None:
    folder, theirs = hub
    model = load(folder)
    ids = token_ids(2, 9)
    with torch.inference_mode(), moezoo.record_routing(model, choices=True) as trace:
        model(ids)
        routed = theirs(ids, output_router_logits=True).router_logits
    for layer, logits in enumerate(routed):
        values, expected = logits.float().topk(2)
        assert trace.topk_ids[layer].tolist() == expected.tolist()
        torch.testing.assert_close(trace.topk_weights[layer], values.softmax(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ON_THE_FLY)
def test_quantised_while_loading(dense: Path, name: str, device: str) -> None:
    """As transformers' model with what the weights then are, but for activations in fp8."""
    asked, format_ = ON_THE_FLY[name]
    model = load(dense, quantization=asked, device=device)
    theirs = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    for ours, layer in zip(moe_layers(model), theirs.model.layers, strict=True):
        assert ours.quantized is format_
        assert ours.bias13 is not None
        w13, w2 = ours.w13().dequantize().cpu(), ours.w2().dequantize().cpu()
        layer.mlp.experts.gate_up_proj.data.copy_(w13.transpose(1, 2).flatten(1, 2).mT)
        layer.mlp.experts.down_proj.data.copy_(w2.mT)
    ids = token_ids(3, 13)
    with torch.inference_mode():
        ours, exact = model(ids.to(device)).logits.cpu(), theirs(ids).logits
    if "fp8" in name:
        assert (ours - exact).norm() / exact.norm() < 0.15
    else:
        assert_close(ours, exact)


@pytest.mark.parametrize("name", ON_THE_FLY)
def test_quantised_experts_are_read_back(
    dense: Path, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked, format_ = ON_THE_FLY[name]
    model = load(dense, quantization=asked)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert ("written one by one" in caplog.text) == (name != "mxfp4")
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "experts" not in str(described.get("modules_to_not_convert"))
    convert(open_checkpoint(dense), tmp_path / "converted", quantization=asked, dtype="float32")
    written, converted = load_file(tmp_path / FILE), load_file(tmp_path / "converted" / FILE)
    assert written.keys() == converted.keys()
    assert all(tensor.equal(converted[name]) for name, tensor in written.items())
    again = load(tmp_path)
    assert {moe.quantized for moe in moe_layers(again)} == {format_}
    before = model.state_dict()
    assert before.keys() == again.state_dict().keys()
    assert all(tensor.equal(before[name]) for name, tensor in again.state_dict().items())


def test_experts_one_by_one(dense: Path, tmp_path: Path) -> None:
    """As those store them who made linear layers of the experts."""
    stored = load_file(dense / FILE)
    for name in [name for name in stored if ".experts." in name]:
        tensor = stored.pop(name)
        layer, end = name.split(".experts.")
        kind = "bias" if end.endswith("bias") else "weight"
        matrices = tensor if kind == "bias" else tensor.mT
        for e, matrix in enumerate(matrices):
            parts = {"down": matrix}
            if end.startswith("gate_up"):
                parts = {"gate": matrix[::2], "up": matrix[1::2]}
            for part, rows in parts.items():
                stored[f"{layer}.experts.{e}.{part}_proj.{kind}"] = rows.contiguous()
    save_file(stored, tmp_path / FILE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    ours, expected = load(tmp_path).state_dict(), load(dense).state_dict()
    assert ours.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("stored", ["dense", "hub"])
def test_the_experts_of_a_rank(dense: Path, hub: tuple[Path, PreTrainedModel], stored: str) -> None:
    owned = [3, 0, 1]
    whole = load(dense if stored == "dense" else hub[0])
    with torch.device("meta"):
        decoder = build(whole.config)
    for moe in moe_layers(decoder):
        for name in ("w13", "w2", "bias13", "bias2"):
            setattr(moe, name, nn.Parameter(getattr(moe, name)[: len(owned)]))
    load_weights(
        decoder,
        open_checkpoint(dense if stored == "dense" else hub[0]),
        CHECKPOINT,
        device=torch.device("cpu"),
        dtype=torch.float32,
        experts=owned,
    )
    expected = whole.decoder.state_dict()
    for name, tensor in decoder.state_dict().items():
        experts = any(f".mlp.{part}" in name for part in ("w13", "w2", "bias13", "bias2"))
        assert tensor.equal(expected[name][owned] if experts else expected[name]), name


def test_inspected(hub: tuple[Path, PreTrainedModel]) -> None:
    folder, theirs = hub
    report = moezoo.inspect(folder)
    assert report.supported
    assert report.stored_as is not None and "mxfp4" in report.stored_as
    assert report.parameters == theirs.num_parameters()
    idle = 3 * sum(p[0].numel() for p in theirs.model.layers[0].mlp.experts.parameters())
    assert report.active_parameters == report.parameters - 3 * idle
    assert report.sliding_windows == {5: 2}
    assert report.experts is not None
    assert report.experts.router == "softmax_topk(renormalize=True, bias=True)"


def test_from_a_config(hub: tuple[Path, PreTrainedModel]) -> None:
    """In MXFP4 if it says so, with biases of zero and sinks as matrices are."""
    torch.manual_seed(0)
    model = moezoo.from_config(load(hub[0]).config, device="cpu")
    assert {moe.quantized for moe in moe_layers(model)} == {Mxfp4}
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
        if name.endswith("sinks"):
            assert 0 < parameter.float().abs().max() < 5 * model.config.initializer_range

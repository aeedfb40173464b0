"""The checkpoint tables against the tensor names, shapes and dtypes of published checkpoints.

`names/*.json` holds, for each, its config and its tensors: a name in which `{0-31}` stands for a
run of numbers, then dtype and shape. `parameters` is the size on the checkpoint's page, by dtype;
where that counts packed numbers, there is the `total_size` of its index in bytes.
"""

import itertools
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moezoo.errors import CheckpointError
from moezoo.layers.linear import FusedLinear
from moezoo.layers.quant import BlockFp8, Mxfp4
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.encodings import encoding_of
from moezoo.loaders.experts import quantized_experts
from moezoo.loaders.mapping import ParameterInfo, TensorInfo
from moezoo.loaders.plan import Plan, plan
from moezoo.registry import architecture, build

NAMES = Path(__file__).parent / "names"
STEMS = sorted(path.stem for path in NAMES.glob("*.json"))
SMALL = ["deepseek-v2-lite", "mixtral-8x7b-v0.1", "olmoe-1b-7b-0924", "qwen1.5-moe-a2.7b"]
DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
RUN = re.compile(r"\{(\d+)-(\d+)\}")

Tensors = dict[str, TensorInfo]


@cache
def read(stem: str) -> dict[str, Any]:
    return json.loads((NAMES / f"{stem}.json").read_text())


def expand(template: str) -> list[str]:
    runs = [range(int(first), int(last) + 1) for first, last in RUN.findall(template)]
    holes = RUN.sub("{}", template)
    return [holes.format(*numbers) for numbers in itertools.product(*runs)]


def tensors(stem: str) -> Tensors:
    return {
        name: TensorInfo(tuple(shape), DTYPES[dtype])
        for template, (dtype, *shape) in read(stem)["tensors"].items()
        for name in expand(template)
    }


@cache
def unquantised(stem: str) -> Tensors:
    """The same checkpoint as somebody who dequantises it would write it."""
    scheme = read(stem)["config"].get("quantization_config", {})
    if scheme.get("quant_method") == "mxfp4":
        return dict(encoding_of(scheme, tensors(stem), stem).tensors)
    return {
        name: TensorInfo(info.shape, torch.bfloat16) if info.dtype.itemsize == 1 else info
        for name, info in tensors(stem).items()
        if not name.endswith("weight_scale_inv")
    }


@cache
def parameters(stem: str) -> dict[str, ParameterInfo]:
    fields = dict(read(stem)["config"])
    model_type = fields.pop("model_type")
    known = {"kimi_k2": "deepseek_v3"}.get(model_type, model_type)
    config = transformers.AutoConfig.for_model(known, **fields)
    with torch.device("meta"):
        decoder = build(config)
    part_sizes = {
        f"{name}.{kind}": module.part_sizes
        for name, module in decoder.named_modules()
        if isinstance(module, FusedLinear)
        for kind in ("weight", "bias")
    }
    return {
        name: ParameterInfo(tuple(p.shape), p.dtype, part_sizes.get(name))
        for name, p in decoder.named_parameters()
    }


def plan_of(stem: str, checkpoint: Tensors) -> Plan:
    module = architecture(read(stem)["config"]["model_type"])
    return plan(module.CHECKPOINT, checkpoint, parameters(stem))


@pytest.mark.parametrize("stem", STEMS)
def test_names_add_up_to_the_published_size(stem: str) -> None:
    record = read(stem)
    if "total_size" in record:
        stored = tensors(stem).values()
        total = sum(math.prod(info.shape) * info.dtype.itemsize for info in stored)
        assert total == record["total_size"]
        return
    sizes = dict.fromkeys(record["parameters"], 0)
    for template, (dtype, *shape) in record["tensors"].items():
        sizes[dtype] += math.prod(shape) * len(expand(template))
    assert sizes == record["parameters"]


@pytest.mark.parametrize("stem", STEMS)
def test_every_tensor_is_used_or_skipped_by_name(stem: str) -> None:
    checkpoint = unquantised(stem)
    made = plan_of(stem, checkpoint)
    used = {copy.source for copy in made.copies}
    skipped = {name: skip for skip, names in made.skipped.items() for name in names}
    assert used | skipped.keys() == checkpoint.keys()
    if stem == "deepseek-v3":
        assert {name for name in checkpoint if name.startswith("model.layers.61.")} == set(skipped)
        assert all("multi-token" in skip.reason for skip in skipped.values())
    else:
        assert not skipped


def test_a_config_that_says_one_layer_too_few_is_no_smaller_model() -> None:
    stem = "deepseek-v3"
    last = f"layers.{read(stem)['config']['num_hidden_layers'] - 1}."
    fewer = {n: info for n, info in parameters(stem).items() if not n.startswith(last)}
    module = architecture(read(stem)["config"]["model_type"])
    with pytest.raises(CheckpointError, match="unknown") as error:
        plan(module.CHECKPOINT, unquantised(stem), fewer)
    assert f"model.{last}" in str(error.value)


def test_block_quantised_checkpoint_is_refused_as_such() -> None:
    stem = "deepseek-v3"
    with pytest.raises(CheckpointError, match="quantised") as error:
        plan_of(stem, tensors(stem))
    assert "weight_scale_inv" in str(error.value)
    assert len(str(error.value)) < 10_000


def test_block_quantised_checkpoint_fits_with_its_config() -> None:
    """All experts stay in fp8, and every weight in fp8 has its scales."""
    stem = "deepseek-v3"
    config = read(stem)["config"]
    stored = tensors(stem)
    encoding = encoding_of(config["quantization_config"], stored, stem)
    assert encoding.tensors == unquantised(stem)
    assert encoding.weights.keys() == {n for n, info in stored.items() if info.dtype.itemsize == 1}
    copies = plan_of(stem, encoding.tensors).copies
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        decoder = build(transformers.AutoConfig.for_model("deepseek_v3", **fields))
    quantized = quantized_experts(decoder, copies, encoding, None)
    num_moe_layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert len(quantized) == 2 * num_moe_layers
    assert set(quantized.values()) == {Kind.of(BlockFp8)}


def test_gpt_oss_runs_in_mxfp4() -> None:
    config = read("gpt-oss-20b")["config"]
    encoding = encoding_of(config["quantization_config"], tensors("gpt-oss-20b"), "gpt-oss-20b")
    copies = plan_of("gpt-oss-20b", encoding.tensors).copies
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        decoder = build(transformers.AutoConfig.for_model("gpt_oss", **fields))
    quantized = quantized_experts(decoder, copies, encoding, None)
    assert len(quantized) == 2 * config["num_hidden_layers"]
    assert set(quantized.values()) == {Kind.of(Mxfp4)}


@pytest.mark.parametrize("stem", SMALL)
def test_old_exports_carry_rotary_frequencies(stem: str) -> None:
    frequencies = TensorInfo((64,), torch.float32)
    extra = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    made = plan_of(stem, unquantised(stem) | dict.fromkeys(extra, frequencies))
    assert set(extra) == {name for names in made.skipped.values() for name in names}


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
@pytest.mark.parametrize("stem", SMALL)
def test_what_does_not_fit_is_named(stem: str, change: str) -> None:
    checkpoint = dict(unquantised(stem))
    name = next(n for n in checkpoint if re.search(r"layers\.5\..*experts\.3\.", n))
    if change == "missing":
        del checkpoint[name]
    elif change == "unknown":
        name = name.replace("experts.3.", "experts.3000.")
        checkpoint[name] = TensorInfo((1,), torch.bfloat16)
    else:
        checkpoint[name] = TensorInfo((7, 9), torch.bfloat16)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        plan_of(stem, checkpoint)

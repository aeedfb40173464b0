"""Weights that the hub's quantisers packed, against what these unpack themselves.

data/gptq_awq.safetensors was made on a CPU by GPTQModel 7.7.0 (`TorchLinear`, its conversion from
"gptq_v2" to "gptq" and back, `AwqTorchLinear`), AutoGPTQ 0.7.1 (`QuantLinear`) and AutoAWQ 0.2.9
(`WQLinear_GEMM`): their quantisers rounded random matrices, some of whose rows are all above or all
below zero so that the smallest and the largest zero points occur, and their layers packed these.
For each case there are the layer's tensors, as `weight` what the tool makes of them (AutoGPTQ: the
product with the identity), and in the metadata the tool and the quantization_config it writes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import SIZES, change, load, moe_layers, set_config
from test_hub_formats import quantized_module
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moezoo.layers.quant import Int4, Int8

DATA = Path(__file__).with_name("data") / "gptq_awq.safetensors"
with safe_open(DATA, "pt") as opened:
    CONFIGS: dict[str, dict[str, Any]] = {
        case: json.loads(about)["quantization_config"]
        for case, about in sorted(opened.metadata().items())
    }


def write(folder: Path, case: str) -> Tensor:
    """A checkpoint whose linear layers are all this case's, and their weight."""
    stored = load_file(DATA)
    packed = {
        end: stored[f"{case}.{end}"]
        for end in ("qweight", "qzeros", "scales", "g_idx")
        if f"{case}.{end}" in stored
    }
    weight = stored[f"{case}.weight"]
    h = len(weight)
    sizes = SIZES | {
        **{"hidden_size": h, "intermediate_size": h, "moe_intermediate_size": h},
        **{"num_key_value_heads": 4, "head_dim": h // 4, "num_hidden_layers": 1},
        **{"num_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0},
    }
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if module := quantized_module(name):
                assert tensors.pop(name).shape == weight.shape
                tensors.update({f"{module}.{end}": t.clone() for end, t in packed.items()})

    change(folder, pack)
    set_config(folder, quantization_config=CONFIGS[case])
    return weight


def same(found: Tensor, weight: Tensor) -> bool:
    """Whether each of `found`'s matrices is this one of fp16.

    What we dequantise to in fp32 is exact, the product of 11 bits and 9: rounded to fp16 it is what
    the tools, whose scales and products are fp16, have.
    """
    return all(part.equal(weight) for part in found.half().reshape(-1, *weight.shape))


@pytest.mark.parametrize("case", CONFIGS)
def test_outside_tools(tmp_path: Path, case: str) -> None:
    weight, config = write(tmp_path, case), CONFIGS[case]
    kind = Int8 if config["bits"] == 8 else Int4
    model: Any = load(tmp_path, dtype="float32")
    attn = model.decoder.layers[0].attn
    experts: Any = moe_layers(model)[0]
    ordered = config.get("desc_act", False) and config["group_size"] != -1
    for held in (attn.qkv.weight, attn.o.weight, experts.w13, experts.w2):
        found = held()
        assert isinstance(found, kind)
        assert same(found.dequantize(), weight)
        assert (found.order is not None) == ordered
        assert (found.zeros is None) == config.get("sym", False)
        if found.zeros is not None:
            assert found.zeros.max() == 2**kind.bits - 1
            # AutoGPTQ's own layer does not read the zero points of 0 that it writes.
            assert (found.zeros.min() == 0) == (not case.startswith("autogptq"))


@pytest.mark.parametrize("case", CONFIGS)
def test_outside_tools_dequantized(tmp_path: Path, case: str) -> None:
    weight = write(tmp_path, case)
    model: Any = load(tmp_path, dtype="float16", quantization={"dense": "dequantize"})
    attn = model.decoder.layers[0].attn
    for found in (attn.qkv.weight, attn.o.weight):
        assert found.dtype == torch.float16
        assert same(found, weight)

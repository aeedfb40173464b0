"""Small models of several architectures, as transformers writes them, and what tests of quantised
checkpoints do with them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moezoo
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import QuantizedWeights
from moezoo.layers.quant.fp8 import quantize_rows
from moezoo.loaders.linears import linears_of
from moezoo.loaders.load import from_pretrained

ASSET = Path(moezoo.__file__).parent / "assets" / "tiny-qwen3-moe"
EXACT = 2e-5
"""The same in fp32 between models with equal weights and plain activations, as in test_oracle."""

SIZES = {
    "vocab_size": 61,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "initializer_range": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | {"intermediate_size": 384, "num_local_experts": 4, "bos_token_id": None},
    "qwen2_moe": SIZES
    | {
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": SIZES
    | {
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "head_dim": 64,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "deepseek_v3": SIZES
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "bos_token_id": None,
    },
}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    options = {"device": "cpu", "progress": False} | options
    return from_pretrained(folder, **options)


def moe_layers(model: nn.Module) -> list[FusedMoE]:
    return [module for module in model.modules() if isinstance(module, FusedMoE)]


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.contiguous().view(torch.uint8).equal(b[name].contiguous().view(torch.uint8))


def theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change(folder: Path, edit) -> None:
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def round_inputs(dense: Any, model: Any) -> None:
    """Let linear layers of `dense` round what they take as those of `model` in fp8 do."""
    layers = linears_of(model.decoder)
    for name, layer in linears_of(dense.decoder).items():
        weight = layers[name].weight
        if isinstance(weight, QuantizedWeights) and "fp8" in weight.kind.format.name:
            layer.register_forward_pre_hook(round_input)


def round_input(_: Any, args: tuple[Tensor]) -> Tensor:
    x = args[0]
    rows = quantize_rows(x.flatten(0, -2)).dequantize()
    return rows[:, : x.shape[-1]].view(x.shape)


@cache
def plain(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    config.pad_token_id = 0
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

"""Tokens a second of `generate`, and the time of a prefill, beside transformers' and the roofline.

    python benchmarks/generate.py [--device cpu] [--case olmoe-4-layers] [--batch 1 --batch 8]

Both implementations hold the same random weights, in the same memory: transformers' model is given
views of moezoo's tensors. Their prefill logits are compared before anything is timed. Runs of the
two alternate; the table gives medians, and the roofline is the bytes that a step has to read
(experts that the batch hits, counted in a run) over the read bandwidth measured in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe, read_bandwidth, synchronize, write_result
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

import moezoo
from moezoo.assets import tiny_model
from moezoo.causal_lm import MoECausalLM
from moezoo.loaders.mapping import layout, parameter_infos
from moezoo.registry import architecture

TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
}


def tiny_mixtral() -> PreTrainedConfig:
    return MixtralConfig(
        **TINY,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )


def tiny_qwen3() -> PreTrainedConfig:
    return AutoConfig.from_pretrained(tiny_model(), max_position_embeddings=2048)


def tiny_deepseek() -> PreTrainedConfig:
    return DeepseekV3Config(
        **TINY,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    )


def olmoe(num_layers: int) -> PreTrainedConfig:
    return OlmoeConfig(intermediate_size=1024, num_hidden_layers=num_layers)


def qwen3_30b() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        num_hidden_layers=48,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
        max_position_embeddings=40960,
    )


CASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny-mixtral": tiny_mixtral,
    "tiny-qwen3-moe": tiny_qwen3,
    "tiny-deepseek-v3": tiny_deepseek,
    "olmoe-4-layers": lambda: olmoe(4),
    "olmoe-1b-7b": lambda: olmoe(16),
    "qwen3-30b-a3b": qwen3_30b,
}
DEFAULT_CASES = {
    "cpu": ["tiny-mixtral", "tiny-qwen3-moe", "tiny-deepseek-v3", "olmoe-4-layers"],
    "cuda": ["olmoe-1b-7b", "qwen3-30b-a3b"],
}


def in_transformers(model: MoECausalLM) -> nn.Module:
    """transformers' model over the same memory: every parameter a view of one of moezoo's."""
    # A fresh config: moezoo's names the attention and the experts that moezoo's model is given,
    # and those that transformers chooses for its own are faster.
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    # The last rule of a target is the stacked layout, which transformers holds in memory.
    rules = tuple(reversed(architecture(model.config.model_type).CHECKPOINT))
    own = model.decoder.state_dict()
    infos = parameter_infos(model.decoder, model.dtype)
    views = {copy.source: own[copy.target][copy.target_index] for copy in layout(rules, infos)}
    twin.load_state_dict(views, strict=not model.config.tie_word_embeddings, assign=True)
    twin.tie_weights()
    rope = type(twin.model.rotary_emb)
    twin.model.rotary_emb = rope(config=model.config).to(model.device)
    left = [name for name, tensor in twin.named_parameters() if tensor.is_meta]
    assert not left, left
    return twin.eval()


def step_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the weights that one decode step of the batch `ids` [B, T] reads.

    `model` is transformers', whose decorator marks the modules that hold stacked experts.
    """
    layers = [module for module in model.modules() if hasattr(module, "is_transposed")]
    stacked = {layer: sum(p.nbytes for p in layer.parameters()) for layer in layers}
    hit = 0

    def count(experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal hit
        hit += len(args[1].unique()) * stacked[experts] // experts.num_experts

    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        hooks = [layer.register_forward_pre_hook(count) for layer in layers]
        model(ids[:, -1:], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    tied = model.config.tie_word_embeddings
    embedding = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(p.nbytes for p in model.parameters()) - sum(stacked.values()) - embedding + hit


def logit_difference(model: nn.Module, twin: nn.Module, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        ours, theirs = model(ids).logits.double(), twin(ids).logits.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def decode(model: nn.Module, ids: torch.Tensor, new_tokens: int) -> Callable[[], object]:
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def prefill(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return model(ids, use_cache=True, logits_to_keep=1)

    return run


def alternate(
    contenders: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds of each: one run unmeasured, then `repeats` rounds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}
        for name, runs in seconds.items()
    }


def measure(case: str, args: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = moezoo.from_config(CASES[case](), dtype=dtype, device=args.device)
    twin = in_transformers(model)
    for contender in (model, twin):  # random weights end no text, at its length all do
        contender.generation_config.eos_token_id = None
    device = model.device
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (1, args.prompt), device=device)
    difference = logit_difference(model, twin, ids)
    if not difference < args.tolerance:
        raise SystemExit(f"{case}: logits differ from transformers' by {difference:.1e}")
    rows = []
    for batch in args.batch:
        ids = torch.randint(1, vocabulary, (batch, args.prompt), device=device)
        runs = {
            "moezoo": decode(model, ids, args.new_tokens),
            "transformers": decode(twin, ids, args.new_tokens),
        }
        tokens = batch * args.new_tokens
        floor = step_bytes(twin, ids) / bandwidth
        row = summary(case, "decode", alternate(runs, args.repeats, device))
        row |= {
            "batch": batch,
            "prompt_tokens": args.prompt,
            "new_tokens": args.new_tokens,
            "tokens_per_second": {n: tokens / s["median"] for n, s in row["seconds"].items()},
            "roofline_tokens_per_second": batch / floor,
        }
        rows.append(row)
    ids = torch.randint(1, vocabulary, (1, args.prefill), device=device)
    runs = {"moezoo": prefill(model, ids), "transformers": prefill(twin, ids)}
    row = summary(case, "prefill", alternate(runs, args.repeats, device))
    row |= {
        "batch": 1,
        "prompt_tokens": args.prefill,
        "tokens_per_second": {n: args.prefill / s["median"] for n, s in row["seconds"].items()},
    }
    rows.append(row)
    for row in rows:
        row |= {"dtype": args.dtype, "logit_difference": difference}
    return rows


def summary(case: str, phase: str, seconds: dict[str, dict[str, float]]) -> dict[str, Any]:
    ratio = seconds["transformers"]["median"] / seconds["moezoo"]["median"]
    return {"case": case, "phase": phase, "seconds": seconds, "times_transformers": ratio}


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title)
    for column in ("", "batch", "moezoo tok/s", "transformers tok/s", "ratio", "of roofline"):
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        speed = row["tokens_per_second"]
        roofline = row.get("roofline_tokens_per_second")
        shown.add_row(
            f"{row['case']} {row['phase']} {row['dtype']}",
            str(row["batch"]),
            f"{speed['moezoo']:.1f}",
            f"{speed['transformers']:.1f}",
            f"{row['times_transformers']:.2f}",
            f"{speed['moezoo'] / roofline:.0%}" if roofline else "",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", action="append", choices=CASES, help="default: by device")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=3e-2, help="relative, of the logits")
    args = parser.parse_args()
    args.batch = args.batch or [1, 8]
    bandwidth = read_bandwidth(args.device)
    rows: list[dict[str, Any]] = []
    for case in args.case or DEFAULT_CASES[torch.device(args.device).type]:
        rows += measure(case, args, bandwidth)
    device = describe(args.device)["device"]
    Console().print(table(rows, f"{device}, {bandwidth / 1e9:.0f} GB/s read"))
    path = write_result(
        "generate",
        args.device,
        {"read_bytes_per_second": bandwidth, "repeats": args.repeats, "rows": rows},
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()

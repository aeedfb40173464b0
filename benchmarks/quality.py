"""What quantising the experts costs in quality: held-out loss, top tokens and weights.

    python benchmarks/quality.py [--model FOLDER ...] [--text FILE] [--device cpu] [--windows N]

Each checkpoint is loaded in bf16, and its experts are quantised in place, in one format after the
other. The loss is in nats a token over windows of consecutive tokens, each a text of its own;
"top-1" is the fraction of tokens whose likeliest next token is another than in bf16, "weights" the
norm of the experts' error over theirs, in the worst layer. Without options it is the small model
of the package. Differences above the limits of `LIMITS`, or of an int4 that does not beat
round-to-nearest in the same groups, end it with exit code 1. A run of a part of the text, another
one, or fewer models than are published is written as quality_partial_<device>.json.
"""

import argparse
import json
import math
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import result_path, write_result
from torch import Tensor, nn

import moezoo
from moezoo.assets import tiny_model
from moezoo.device import device_of
from moezoo.layers.moe import FusedMoE
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4

TEXT = Path(__file__).parent / "data" / "heldout.txt"
LENGTH = 512
BATCH = 8


@dataclass(frozen=True)
class Scheme:
    """A way to store the experts: in a format, or without one in `dtype`."""

    label: str
    format: type[Format] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    nearest: str | None = None
    """Label of the scheme that it must be better than."""

    def takes(self, *columns: int) -> bool:
        size = self.options.get("group_size", 32 if self.format is Mxfp4 else -1)
        return size == -1 or all(k % size == 0 for k in columns)


def _int4(group_size: int) -> list[Scheme]:
    nearest = f"int4, groups of {group_size}, round to nearest"
    sizes = {"group_size": group_size}
    return [
        Scheme(nearest, Int4, sizes | {"search": False}),
        Scheme(f"int4, groups of {group_size}", Int4, sizes, nearest=nearest),
        Scheme(f"int4, groups of {group_size}, zeros", Int4, sizes | {"zeros": True}),
    ]


BASE = Scheme("bf16")
SCHEMES = [
    BASE,
    Scheme("fp32", dtype=torch.float32),
    Scheme("fp8, blocks", BlockFp8),
    Scheme("fp8, channels", ChannelFp8),
    Scheme("fp8, tensors", ChannelFp8, {"granularity": "tensor"}),
    Scheme("int8, channels", Int8),
    Scheme("int8, groups of 64", Int8, {"group_size": 64}),
    *_int4(128),
    *_int4(64),
    *_int4(32),
    Scheme("mxfp4", Mxfp4),
]

LIMITS = {"fp8": 0.01, "int8": 0.005, "int4": 0.08, "mxfp4": 0.12}
"""First word of a label -> nats by which the loss may differ from bf16's."""


@dataclass(frozen=True)
class Quality:
    scheme: Scheme
    loss: float
    top1: Tensor
    """Most likely next token after each token."""
    weight_errors: list[float]
    """Relative error of the experts' weights in each MoE layer."""
    bits: float
    """Bits per weight of the experts, scales included."""


def windows_of(text: str, folder: Path, length: int) -> Tensor:
    """Return windows of consecutive tokens, [windows, length]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@contextmanager
def held(model: nn.Module, scheme: Scheme) -> Iterator[tuple[list[float], float]]:
    """Quantise the experts of `model` in the block; yield layers' errors and bits per weight."""
    layers = [module for module in model.modules() if isinstance(module, FusedMoE)]
    plain = [(layer.w13, layer.w2) for layer in layers]
    if scheme.format is None:
        yield [0.0] * len(layers), 8.0 * scheme.dtype.itemsize
        return
    errors, num_bytes = [], 0
    for layer, (w13, w2) in zip(layers, plain, strict=True):
        weights = w13.data.unflatten(1, (2, -1)), w2.data
        quantized = [scheme.format.quantize(w, **scheme.options) for w in weights]
        errors.append(error(weights, quantized))
        num_bytes += sum(t.nbytes for q in quantized for t in q.tensors().values() if t is not None)
        layer.quantize_(*quantized)
    try:
        yield errors, 8 * num_bytes / sum(w.numel() for pair in plain for w in pair)
    finally:
        for layer, (w13, w2) in zip(layers, plain, strict=True):
            del layer.w13, layer.w2
            layer.w13, layer.w2 = w13, w2


def error(weights: tuple[Tensor, ...], quantized: list[Format]) -> float:
    """Return the norm of the difference over that of the weights, one expert at a time."""
    lost = size = 0.0
    for w, q in zip(weights, quantized, strict=True):
        for e in range(len(w)):
            exact = w[e].float()
            lost += (q[e].dequantize() - exact).square().sum().item()
            size += exact.square().sum().item()
    return math.sqrt(lost / size)


@torch.inference_mode()
def loss_and_top1(model: nn.Module, windows: Tensor) -> tuple[float, Tensor]:
    device = next(model.parameters()).device
    losses, top1 = [], []
    for batch in windows.split(BATCH):
        ids = batch.to(device)
        logits = model(ids).logits[:, :-1].flatten(0, 1).float()
        losses.append(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").double())
        top1.append(logits.argmax(-1))
    return torch.cat(losses).mean().item(), torch.cat(top1).cpu()


def measure(folder: Path, windows: Tensor, device: torch.device) -> list[Quality]:
    found = []
    model = None
    for scheme in SCHEMES:
        if model is None or model.dtype != scheme.dtype:
            model = None  # its memory, before the next has its own
            model = moezoo.from_pretrained(
                folder, dtype=scheme.dtype, device=device, progress=False
            )
        layer = next(module for module in model.modules() if isinstance(module, FusedMoE))
        if scheme.takes(layer.w2.shape[1], layer.w2.shape[2]):
            with held(model, scheme) as (errors, bits):
                loss, top1 = loss_and_top1(model, windows)
            found.append(Quality(scheme, loss, top1, errors, bits))
    return found


def failures(qualities: list[Quality], *, whole: bool = True) -> list[str]:
    """Return a message for each figure that is over its limit. Losses of a search and of
    round-to-nearest differ too little to be compared unless it is on the `whole` text."""
    base = qualities[0]
    losses = {quality.scheme.label: quality.loss for quality in qualities}
    found = []
    for label, loss in losses.items():
        limit = LIMITS.get(label.partition(",")[0])
        if limit is not None and "nearest" not in label and abs(loss - base.loss) > limit:
            found.append(f"{label}: {loss - base.loss:+.4f} nats, allowed are {limit}")
    for quality in qualities:
        nearest = quality.scheme.nearest
        if whole and nearest is not None and quality.loss >= losses[nearest]:
            found.append(f"{quality.scheme.label}: {quality.loss:.4f}, {nearest} is not worse")
    return found


def entry(quality: Quality, base: Quality) -> dict[str, Any]:
    return {
        "scheme": quality.scheme.label,
        "bits_per_weight": quality.bits,
        "loss": quality.loss,
        "loss_over_bf16": quality.loss - base.loss,
        "top1_changed": (quality.top1 != base.top1).double().mean().item(),
        "weight_error_by_layer": quality.weight_errors,
    }


def show(name: str, entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"experts of {name}")
    for column in ("", "bits", "loss", "over bf16", "top-1", "weights"):
        table.add_column(column, justify="right" if column else "left")
    for row in entries:
        table.add_row(
            row["scheme"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['loss_over_bf16']:+.4f}",
            f"{row['top1_changed']:.1%}",
            f"{max(row['weight_error_by_layer']):.2%}",
        )
    Console().print(table)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, nargs="+", default=[tiny_model()])
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--device", default=None)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="the first so many; default all of the text")
    return parser.parse_args(argv)


def is_whole(args: argparse.Namespace) -> bool:
    return args.windows is None and args.text == TEXT and args.length == LENGTH


def result_name(args: argparse.Namespace, published: Path, models: Collection[str]) -> str:
    """Return the result's name, a partial one for other text or fewer models than are published."""
    before = json.loads(published.read_text())["checkpoints"] if published.exists() else {}
    return "quality" if is_whole(args) and set(before) <= set(models) else "quality_partial"


def main() -> None:
    args = arguments(sys.argv[1:])
    device = device_of(args.device)
    text = args.text.read_text()
    checkpoints, wrong = {}, []
    for folder in args.model:
        windows = windows_of(text, folder, args.length)[: args.windows]
        qualities = measure(folder, windows, device)
        entries = [entry(quality, qualities[0]) for quality in qualities]
        show(folder.name, entries)
        checkpoints[folder.name] = {
            "predictions": windows[:, 1:].numel(),
            "window": args.length,
            "schemes": entries,
        }
        wrong += [
            f"{folder.name}, {failure}" for failure in failures(qualities, whole=is_whole(args))
        ]
    content = {"text": args.text.name, "limits": LIMITS, "checkpoints": checkpoints}
    name = result_name(args, result_path("quality", device), checkpoints)
    print(f"written to {write_result(name, device, content)}")
    if wrong:
        sys.exit("\n".join(["over the limits:", *wrong]))


if __name__ == "__main__":
    main()

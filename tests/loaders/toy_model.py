"""A module with every kind of rule, and checkpoints for it."""

from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import nn

from moezoo.loaders.mapping import Rule, Skip

LAYERS, EXPERTS, HIDDEN, INNER = 2, 4, 8, 6

RULES = (
    Rule("embed.weight", "m.embed"),
    Rule("layers.{L}.qkv.weight", "m.{L}.q", "m.{L}.k", "m.{L}.v"),
    Rule("layers.{L}.o", "m.{L}.o", view="transpose"),
    Rule("layers.{L}.w13", "m.{L}.e.{E}.gate", "m.{L}.e.{E}.up", shard="expert"),
    Rule("layers.{L}.w13", "m.{L}.e.gate_up", shard="expert"),
    Rule("layers.{L}.w13", "m.{L}.e.mixed", shard="expert", view=("transpose", "deinterleave")),
    Rule("layers.{L}.w2", "m.{L}.e.{E}.down", shard="expert"),
    Rule("layers.{L}.w2", "m.{L}.e.down", shard="expert"),
    Rule("layers.{L}.w2", "m.{L}.e.flat", shard="expert", view=("unflatten", "transpose")),
    Rule("layers.{L}.bias", "m.{L}.bias"),
    Rule("layers.{L}.steps", "m.{L}.steps"),
    Skip("m.extra.{*}", "for training"),
)


class Layer(nn.Module):
    keep_dtype: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.qkv.part_sizes = (HIDDEN, HIDDEN // 2, HIDDEN // 2)
        self.o = nn.Parameter(torch.randn(HIDDEN, 3))
        self.w13 = nn.Parameter(torch.randn(experts, 2 * INNER, HIDDEN))
        self.w2 = nn.Parameter(torch.randn(experts, HIDDEN, INNER))
        self.bias = nn.Parameter(torch.randn(EXPERTS, dtype=torch.float32), requires_grad=False)
        self.register_buffer("steps", torch.randint(0, 99, (2,)))


class Toy(nn.Module):
    """`experts` are those that this rank owns."""

    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, HIDDEN)
        self.layers = nn.ModuleList(Layer(experts) for _ in range(LAYERS))


def on_meta(experts: int = EXPERTS) -> Toy:
    with torch.device("meta"):
        return Toy(experts)


def tensors(toy: Toy, layout: str = "per expert") -> dict[str, torch.Tensor]:
    """What a checkpoint of `toy` holds: experts each for itself, "stacked", or "exotic"."""
    stored = {"m.embed": toy.embed.weight, "m.extra.x": torch.ones(3)}
    for n, layer in enumerate(toy.layers):
        parts = layer.qkv.weight.split(layer.qkv.part_sizes)
        stored |= {f"m.{n}.{name}": part for name, part in zip("qkv", parts, strict=True)}
        stored |= {f"m.{n}.o": layer.o.T, f"m.{n}.bias": layer.bias, f"m.{n}.steps": layer.steps}
        gate, up = layer.w13.chunk(2, 1)
        if layout == "per expert":
            for e in range(len(layer.w2)):
                stored[f"m.{n}.e.{e}.gate"] = gate[e]
                stored[f"m.{n}.e.{e}.up"] = up[e]
                stored[f"m.{n}.e.{e}.down"] = layer.w2[e]
        elif layout == "stacked":
            stored |= {f"m.{n}.e.gate_up": layer.w13, f"m.{n}.e.down": layer.w2}
        else:
            mixed = torch.stack((gate, up), 2).flatten(1, 2)
            stored[f"m.{n}.e.mixed"] = mixed.transpose(1, 2)
            stored[f"m.{n}.e.flat"] = layer.w2.transpose(1, 2).flatten(0, 1)
    return {name: tensor.detach().contiguous() for name, tensor in stored.items()}


def write(folder: Path, stored: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    save_file(stored, folder / "model.safetensors")
    return folder

"""Layers that are measured and tuned: their sizes, and random weights for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moezoo.formats import FP8, INT4, INT8, MXFP4
from moezoo.layers.quant import BlockFp8, ChannelFp8, Format, Int4, Int8, Mxfp4


@dataclass(frozen=True)
class Layer:
    num_experts: int
    k: int
    hidden_size: int
    intermediate_size: int

    @property
    def expert_elements(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def flop(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.k * self.expert_elements


LAYERS = {
    "qwen3-30b-a3b": Layer(128, 8, 2048, 768),
    "mixtral-8x7b": Layer(8, 2, 4096, 14336),
    "deepseek-v3": Layer(256, 8, 7168, 2048),
    "olmoe-1b-7b": Layer(64, 8, 2048, 1024),
    "deepseek-v2-lite": Layer(64, 6, 2048, 1408),
    "gpt-oss-20b": Layer(32, 4, 2880, 2880),
}
"""Sizes of released models' MoE layers; all are measured with plain SwiGLU experts."""

FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    FP8: (BlockFp8, {}),
    f"{FP8}_channel": (ChannelFp8, {}),
    INT8: (Int8, {}),
    INT4: (Int4, {"group_size": 128}),
    MXFP4: (Mxfp4, {}),
}
"""Name of a quantisation in measurements -> its format and the format's options."""


@dataclass(frozen=True)
class Weights:
    """Weights of a layer's experts: w13 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I]."""

    w13: Tensor
    w2: Tensor

    @classmethod
    def random(
        cls, layer: Layer, dtype: torch.dtype, device: torch.device, *, seed: int = 0
    ) -> "Weights":
        """Return normal weights, scaled such that activations stay near 1."""
        generator = torch.Generator(device).manual_seed(seed)
        E, H, I = layer.num_experts, layer.hidden_size, layer.intermediate_size
        w13 = torch.empty(E, 2 * I, H, dtype=dtype, device=device)
        w2 = torch.empty(E, H, I, dtype=dtype, device=device)
        for expert in range(E):
            w13[expert].normal_(std=H**-0.5, generator=generator)
            w2[expert].normal_(std=I**-0.5, generator=generator)
        return cls(w13, w2)

    @property
    def quantization(self) -> str | None:
        return None

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """Return w13 [2I, H] and w2 [H, I] of one expert in fp32."""
        return self.w13[index].float(), self.w2[index].float()


@dataclass(frozen=True)
class QuantizedWeights:
    """Quantised weights of a layer's experts in one format: w13 [E, 2, I, H] and w2 [E, H, I]."""

    w13: Format
    w2: Format

    @classmethod
    def random(
        cls, layer: Layer, device: torch.device, quantization: str = FP8
    ) -> "QuantizedWeights":
        """Return the weights of `Weights.random`, quantised expert by expert."""
        format_, options = FORMATS[quantization]
        one = Layer(1, 1, layer.hidden_size, layer.intermediate_size)
        parts = []
        for seed in range(layer.num_experts):
            weights = Weights.random(one, torch.bfloat16, device, seed=seed)
            w13 = weights.w13.unflatten(1, (2, -1))
            parts.append(tuple(format_.quantize(w, **options) for w in (w13, weights.w2)))
        w13s, w2s = zip(*parts, strict=True)
        return cls(_joined(w13s), _joined(w2s))

    @property
    def quantization(self) -> str | None:
        return self.w13.name

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        return self.w13[index].dequantize().flatten(0, 1), self.w2[index].dequantize()

    def dequantized(self, dtype: torch.dtype) -> Weights:
        """Return these weights in `dtype`, dequantised expert by expert."""
        num_experts, hidden_size, intermediate_size = self.w2.shape
        device = self.w2.device
        sizes = (num_experts, 2 * intermediate_size, hidden_size)
        w13, w2 = (torch.empty(s, dtype=dtype, device=device) for s in (sizes, self.w2.shape))
        for index in range(num_experts):
            w13[index], w2[index] = self.expert(index)
        return Weights(w13, w2)


def _joined(parts: Sequence[Format]) -> Format:
    def cat(tensors: tuple[Any, ...]) -> Any:
        return None if tensors[0] is None else torch.cat(tensors)

    fields = zip(*(part.tensors().values() for part in parts), strict=True)
    return type(parts[0])(*map(cat, fields))


def on_meta(layer: Layer, quantization: str) -> QuantizedWeights:
    """Return weights on the meta device, without memory or values."""
    format_, options = FORMATS[quantization]
    E, H, I = layer.num_experts, layer.hidden_size, layer.intermediate_size
    return QuantizedWeights(
        format_.on_meta(E, 2, I, H, **options), format_.on_meta(E, H, I, **options)
    )


def expert_bytes(layer: Layer, dtype: torch.dtype, quantization: str | None) -> int:
    """Return the bytes of one expert's weights, scales included."""
    if quantization is None:
        return layer.expert_elements * dtype.itemsize
    weights = on_meta(layer, quantization)
    tensors = [*weights.w13.tensors().values(), *weights.w2.tensors().values()]
    return sum(t.nbytes for t in tensors if t is not None) // layer.num_experts


def random_weights(
    layer: Layer, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> Weights | QuantizedWeights:
    if quantization is None:
        return Weights.random(layer, dtype, device)
    return QuantizedWeights.random(layer, device, quantization)


def empty_weights(
    layer: Layer, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> Weights | QuantizedWeights:
    """Return weights of arbitrary values, which take no time to make."""
    if quantization is None:
        E, H, I = layer.num_experts, layer.hidden_size, layer.intermediate_size
        sizes = ((E, 2 * I, H), (E, H, I))
        return Weights(*(torch.empty(size, dtype=dtype, device=device) for size in sizes))
    weights = on_meta(layer, quantization)

    def made(w: Format) -> Format:
        return w.map(lambda tensor: torch.empty_like(tensor, device=device))

    return QuantizedWeights(made(weights.w13), made(weights.w2))

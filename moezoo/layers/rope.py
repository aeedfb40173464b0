"""Rotary position embeddings (Su et al., 2021) and the scalings that transformers' configs name.

Legend: B batch, T tokens, D rotated dimensions of a head.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moezoo.errors import UnsupportedArchitectureError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and signed sine, each [B or 1, T, 1, D] in the model's dtype."""


def default_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """theta^(-2i/D) for i < D/2, fp32 [D/2], D the head's width."""
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents


def _with_head_dim(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the head's width spelt out; some of transformers' functions rely on it."""
    if getattr(config, "head_dim", None) is not None:
        return config
    config = copy.copy(config)
    config.head_dim = config.hidden_size // config.num_attention_heads
    return config


class RotaryEmbedding(nn.Module):
    """Cosines and sines for given positions.

    Scaled frequencies are transformers' own functions of the config. Those of two scalings depend
    on the length of the sequence, and are computed from it on the device, without a
    synchronisation: "longrope" takes its long factors beyond the original context, "dynamic"
    stretches theta with the length. Nothing is remembered between calls: the same input always
    gives the same output.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = _with_head_dim(config)
        self.kind = config.rope_parameters.get("rope_type")
        partial = config.rope_parameters.get("partial_rotary_factor", 1) != 1
        if self.kind not in ROPE_TYPES or partial:
            raise UnsupportedArchitectureError.of_field(
                config,
                "rope_parameters",
                f"one rope_type of {', '.join(ROPE_TYPES)}, and no partial_rotary_factor",
            )
        self.scale = 1.0
        try:
            self._compute(self.config)
        except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
            raise UnsupportedArchitectureError.of_field(
                config, "rope_parameters", f"what frequencies can be computed from ({error})"
            ) from error

    def _compute(self, config: PreTrainedConfig) -> None:
        # Frequencies are plain tensors on the CPU, so that a model built on meta has them too.
        with torch.device("cpu"):
            if self.kind == "default":
                self.inv_freq = default_frequencies(config)
            else:
                self.inv_freq, self.scale = ROPE_INIT_FUNCTIONS[self.kind](config)
            if self.kind == "longrope":
                self.context = config.rope_parameters["original_max_position_embeddings"]
                self.long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](
                    config, seq_len=self.context + 1
                )
        if not self.inv_freq.isfinite().all():
            raise ValueError("they are not finite")

    def _frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        device = positions.device
        if self.kind == "dynamic":
            inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, device, positions.max() + 1)
            return inv_freq
        if self.inv_freq.device != device:
            self.inv_freq = self.inv_freq.to(device)
            if self.kind == "longrope":
                self.long_inv_freq = self.long_inv_freq.to(device)
        if self.kind == "longrope":
            return torch.where(positions.max() >= self.context, self.long_inv_freq, self.inv_freq)
        return self.inv_freq

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """positions int [B or 1, T] -> cosine and signed sine [B or 1, T, 1, D] in `dtype`."""
        inv_freq = self._frequencies(positions)
        # cos(-a) = cos(a) and sin(-a) = -sin(a): both halves at once, sign included.
        angles = positions[..., None, None] * torch.cat((-inv_freq, inv_freq))
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


def rotate_half(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate x [B, T, heads, D]; dimensions i and i + D/2 are a pair."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_interleaved(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate x [B, T, heads, D]; dimensions 2i and 2i + 1 are a pair.

    The result has the pairs' first members before their second ones. Queries and keys get the same
    order, so their products do not change.
    """
    return rotate_half(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rotation)

"""Rotary position embeddings (Su et al., 2021) and the scalings that transformers' configs name.

Legend: B batch, T tokens, D rotated dimensions of a head.
"""

import copy
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moezoo.errors import UnsupportedArchitectureError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "longrope", "yarn")

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and signed sine, each [B or 1, T, 1, D] in the model's dtype."""

Rotate = Callable[[torch.Tensor, Rotation], torch.Tensor]
"""A function that rotates queries and keys by their positions: `rotate_half`, `rotate_interleaved`
or `unrotated`."""


def default_frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """Return theta^(-2i/D) for i < D/2 in fp32; D is the head's width times the config's
    `partial_rotary_factor`."""
    dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents


def _with_head_dim(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with `head_dim` set, which some of transformers' functions need."""
    if getattr(config, "head_dim", None) is not None:
        return config
    config = copy.copy(config)
    config.head_dim = config.hidden_size // config.num_attention_heads
    return config


class RotaryEmbedding(nn.Module):
    """Cosines and sines for given positions.

    Scaled frequencies are computed by transformers' own functions of the config. With two scalings
    they depend on the length of the sequence, and are computed from it on the device, without a
    synchronisation: "longrope" uses its long factors beyond the original context, "dynamic"
    stretches theta with the length. Nothing is remembered between calls: the same input always
    gives the same output.

    Raises `UnsupportedArchitectureError` for a config that frequencies cannot be computed from.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = _with_head_dim(config)
        self.rope_type = config.rope_parameters.get("rope_type")
        if self.rope_type not in ROPE_TYPES:
            raise UnsupportedArchitectureError.of_field(
                config, "rope_parameters", f"one rope_type of {', '.join(ROPE_TYPES)}"
            )
        self.scale = 1.0
        try:
            self._compute(self.config)
        except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
            raise UnsupportedArchitectureError.of_field(
                config, "rope_parameters", f"what frequencies can be computed from ({error})"
            ) from error

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of its sequence."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def dim(self) -> int:
        """Number of rotated dimensions D, which may be less than the width of a head."""
        return 2 * len(self.inv_freq)

    def _compute(self, config: PreTrainedConfig) -> None:
        # Frequencies are plain tensors on the CPU, so that a model built on meta has them too.
        with torch.device("cpu"):
            if self.rope_type == "default":
                self.inv_freq = default_frequencies(config)
            else:
                self.inv_freq, self.scale = ROPE_INIT_FUNCTIONS[self.rope_type](config)
            if self.rope_type == "longrope":
                self.context = config.rope_parameters["original_max_position_embeddings"]
                self.long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](
                    config, seq_len=self.context + 1
                )
                for name in ("short_factor", "long_factor"):
                    if len(config.rope_parameters[name]) != len(self.inv_freq):
                        raise ValueError(f"{name} needs {len(self.inv_freq)} numbers")
        if not self.inv_freq.isfinite().all():
            raise ValueError("they are not finite")
        if not 2 <= self.dim <= config.head_dim:
            raise ValueError(f"they are for {self.dim} of the {config.head_dim} numbers of a head")

    def _frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        device = positions.device
        if self.rope_type == "dynamic":
            inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, device, positions.max() + 1)
            return inv_freq
        if self.inv_freq.device != device:
            self.inv_freq = self.inv_freq.to(device)
            if self.rope_type == "longrope":
                self.long_inv_freq = self.long_inv_freq.to(device)
        if self.rope_type == "longrope":
            return torch.where(positions.max() >= self.context, self.long_inv_freq, self.inv_freq)
        return self.inv_freq

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """Return cosine and signed sine [B or 1, T, 1, D] of positions int [B or 1, T], in
        `dtype`."""
        inv_freq = self._frequencies(positions)
        # cos(-a) = cos(a) and sin(-a) = -sin(a): both halves at once, sign included.
        angles = positions[..., None, None] * torch.cat((-inv_freq, inv_freq))
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


class RotaryEmbeddings(nn.Module):
    """Several embeddings for layers that differ, with concatenated cosines and sines.

    `parts[name]` is the slice of the last dimension that belongs to the embedding `name`.
    """

    def __init__(self, embeddings: Mapping[str, RotaryEmbedding]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(embeddings.values())
        ends = list(accumulate(one.dim for one in embeddings.values()))
        self.parts = {
            name: slice(end - one.dim, end)
            for (name, one), end in zip(embeddings.items(), ends, strict=True)
        }

    @property
    def depends_on_length(self) -> bool:
        """Whether any of the embeddings depends on the length of the sequence."""
        return any(one.depends_on_length for one in self.embeddings)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        cosines, sines = zip(*(one(positions, dtype) for one in self.embeddings), strict=True)
        return torch.cat(cosines, -1), torch.cat(sines, -1)


class NoRotation(nn.Module):
    """A rotation by 0, for decoders that know positions by the causal mask alone.

    Cosines of 1 and sines of 0 leave `dim` numbers exactly as they are, in kernels too.
    """

    depends_on_length = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """Return cosine and signed sine [B or 1, T, 1, dim] of positions int [B or 1, T], in
        `dtype`."""
        sin = torch.zeros(*positions.shape, 1, self.dim, dtype=dtype, device=positions.device)
        return sin + 1, sin


def rope_of_whole_heads(config: PreTrainedConfig) -> RotaryEmbedding:
    """Make the embedding of architectures that always rotate whole heads.

    Raises `UnsupportedArchitectureError` for a config with a `partial_rotary_factor`, which they
    would ignore.
    """
    rope = RotaryEmbedding(config)
    if rope.dim != rope.config.head_dim:
        raise UnsupportedArchitectureError.of_field(
            config, "rope_parameters", "one without a partial_rotary_factor"
        )
    return rope


def rotate_half(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the first D numbers of x [B, T, heads, ..]; i and i + D/2 are a pair."""
    cos, sin = rotation
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate_half(x[..., :dim], rotation), x[..., dim:]), -1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


def rotate_interleaved(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the first D numbers of x [B, T, heads, ..]; 2i and 2i + 1 are a pair.

    The result has the pairs' first members before their second ones. Queries and keys get the same
    order, so their products do not change.
    """
    dim = rotation[0].shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate_interleaved(x[..., :dim], rotation), x[..., dim:]), -1)
    return rotate_half(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rotation)


def unrotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return x as it is, for layers that know positions by the causal mask alone (NoPE)."""
    return x

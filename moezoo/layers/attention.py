"""Causal attention with grouped queries (Ainslie et al., 2023).

Legend: B batch, T new tokens, S keys (cached and new), Hq query heads, Hk key heads, D key width,
Dv value width.
"""

import torch
from torch import nn

from moezoo.layers.context import Context
from moezoo.layers.kernels.windows import Chunked
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.mixer import SequenceMixer
from moezoo.layers.norm import NormOfSum, RMSNorm, input_for
from moezoo.layers.rope import Rotate, Rotation, rotate_half


class GroupedQueryAttention(SequenceMixer):
    """Attention in which several query heads share a key head, of width `head_dim`, and a value
    head, of width `value_dim`.

    `q_norm` and `k_norm` normalise each head (width `head_dim`) or all heads at once (width heads *
    `head_dim`) before the rotation. `window` is the number of newest keys that a query sees, its
    own included, or those of its chunk if it is `Chunked`. `clip` bounds queries, keys and values
    to [-clip, clip] before the rotation. `rotate` is a function of `moezoo.layers.rope`, and `part`
    selects its numbers where a decoder has `RotaryEmbeddings`. `scale` multiplies the scores, by
    default 1 / sqrt(`head_dim`). `sinks` [Hq], a parameter, are an extra score for each head, that
    of a key without a value.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int,
        value_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        window: int | None = None,
        clip: float | None = None,
        rotate: Rotate = rotate_half,
        part: slice | None = None,
        scale: float | None = None,
        sinks: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        value_dim = value_dim or head_dim
        self.sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * value_dim)
        self.qkv = FusedLinear(hidden_size, self.sizes, qkv_bias)
        self.o = Linear(num_heads * value_dim, hidden_size, bias=out_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.window = window
        if window is not None:
            chunked = isinstance(window, Chunked)
            self.layer_type = "chunked_attention" if chunked else "sliding_attention"
        self.clip = clip
        self.rotate = rotate
        self.part = part
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sinks = sinks

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of a token's keys and values in the cache, each [heads, width]."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.value_dim)

    def own_rotation(self, rotation: Rotation) -> Rotation:
        """Return the part of the decoder's rotation that this layer uses."""
        if self.part is None:
            return rotation
        cos, sin = rotation
        return cos[..., self.part], sin[..., self.part]

    @property
    def has_usual_heads(self) -> bool:
        """Whether `heads` is not overridden, so that the kernel that rotates and stores replaces
        it."""
        return type(self).heads is GroupedQueryAttention.heads

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]; keys and values go to the cache under `layer_idx`."""
        project = self.qkv
        qkv = project(input_for(project, x))
        return self.o(self.attended(qkv, context, layer_idx).flatten(2))

    def attended(self, qkv: torch.Tensor, context: Context, layer_idx: int) -> torch.Tensor:
        """Store the keys and values of qkv [B, T, ..] and attend with its queries; return
        [B, T, Hq, Dv]."""
        q, keys = context.append_heads(self, qkv, layer_idx)
        return context.attend(q, keys, window=self.window, scale=self.scale, sinks=self.sinks)

    def heads(
        self, qkv: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split qkv [B, T, ..] into q [B, T, Hq, D], k [B, T, Hk, D] and v [B, T, Hk, Dv],
        normalised, clipped and rotated."""
        # Queries and keys are rotated together: on a CPU a token's time is that of the torch calls.
        if self.q_norm is None or self.k_norm is None:
            qk, v = qkv.split_with_sizes((sum(self.sizes[:2]), self.sizes[2]), -1)
            qk = qk.unflatten(-1, (-1, self.head_dim))
        else:
            q, k, v = qkv.split_with_sizes(self.sizes, -1)
            q = self.q_norm(q.unflatten(-1, (-1, self.q_norm.dim)))
            k = self.k_norm(k.unflatten(-1, (-1, self.k_norm.dim)))
            if self.q_norm.dim != self.head_dim:
                q, k = (x.flatten(2).unflatten(-1, (-1, self.head_dim)) for x in (q, k))
            qk = torch.cat((q, k), 2)
        v = v.unflatten(-1, (-1, self.value_dim))
        if self.clip is not None:
            qk, v = qk.clamp(-self.clip, self.clip), v.clamp(-self.clip, self.clip)
        qk = self.rotate(qk, self.own_rotation(rotation))
        q, k = qk.split_with_sizes((self.num_heads, self.num_kv_heads), 2)
        return q, k, v

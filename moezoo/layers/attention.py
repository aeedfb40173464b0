"""Causal attention with grouped queries (Ainslie et al., 2023), and what all attention shares.

Legend: B batch, T new tokens, S keys (cached and new), Hq query heads, Hk key heads, D head width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from moezoo.layers.chosen_keys import Chooser, attend_to_chosen
from moezoo.layers.kernels.windows import Chunked, first_key
from moezoo.layers.linear import FusedLinear, Linear
from moezoo.layers.norm import NormOfSum, RMSNorm, handed_to
from moezoo.layers.rope import Rotate, Rotation, rotate_half
from moezoo.layers.states import StateLayer, cache_states, cached_states, no_states


class LayerCache(Protocol):
    """What attention asks of a KV cache; every `transformers.Cache` has it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, D] keys and values; return those that the new queries may see."""
        ...


class CausalMask:
    """Which keys the T newest tokens may see; one tensor a window, built when first asked for.

    `past` tokens came before. `visible` is bool [B, past + T], False where a token is padding, or
    None; or a 4-D mask that is taken as it is: bool, or float to be added to the scores.
    """

    def __init__(
        self, past: int, length: int, device: torch.device, visible: torch.Tensor | None = None
    ) -> None:
        self.past = past
        self.length = length
        self.device = device
        self.visible = visible
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def to(self, device: torch.device) -> "CausalMask":
        visible = None if self.visible is None else self.visible.to(device)
        return CausalMask(self.past, self.length, device, visible)

    def is_plain(self, num_keys: int, window: int | None) -> bool:
        """Whether causality alone decides and the keys are exactly the T new tokens."""
        fits = window is None or self.length <= window
        return self.visible is None and num_keys == self.length and fits

    def __call__(self, num_keys: int, window: int | None) -> torch.Tensor | None:
        """Mask broadcastable to [B, heads, T, S], or None where every query may see every key."""
        key = (num_keys, window)
        if key not in self._masks:
            self._masks[key] = self._build(num_keys, window)
        return self._masks[key]

    def _build(self, num_keys: int, window: int | None) -> torch.Tensor | None:
        total = self.past + self.length
        # A cache hands out the newest keys (sliding window) or room for more than it has (static).
        first = max(total - num_keys, 0)
        if self.visible is not None and self.visible.dim() == 4:
            return self.visible[..., first : first + num_keys]
        sees_all = window is None or first_key(total - 1, window) <= total - num_keys
        if self.visible is None and self.length == 1 and num_keys <= total and sees_all:
            return None
        queries = torch.arange(self.past, total, device=self.device)[:, None]
        keys = torch.arange(first, first + num_keys, device=self.device)
        mask = keys <= queries
        if isinstance(window, Chunked) and self.visible is not None:
            # Chunks are counted from the first token, which padding may precede.
            padding = (self.visible.cumsum(-1) == 0).sum(-1)[:, None, None, None]
            mask = mask & (keys >= first_key(queries - padding, window) + padding)
        elif window is not None:
            mask &= keys >= first_key(queries, window)
        if self.visible is None:
            return mask[None, None]
        visible = self.visible[:, first : first + num_keys]
        if visible.shape[1] < num_keys:
            visible = F.pad(visible, (0, num_keys - visible.shape[1]))
        # A padding token sees itself, so that its row is not empty: softmax of nothing is NaN.
        return (mask & visible[:, None, None]) | (keys == queries)


def visible_tokens(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as `CausalMask` takes it: 2-D as bool, or None if it hides nothing; 4-D as it is."""
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    visible = attention_mask.bool()
    # A graph that torch.compile traces is for any mask.
    return visible if torch.compiler.is_compiling() or not visible.all() else None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: CausalMask,
    *,
    window: int | None = None,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention: q [B, Hq, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, Hq, T, Dv].

    Query head h reads key head h // (Hq / Hk). A query sees the `window` newest keys up to its own.
    `sinks` [Hq] are one more score a head, of a key without a value.
    """
    groups = q.shape[1] // k.shape[1]
    if sinks is not None:
        allowed = mask(k.shape[2], window)
        if allowed is not None:
            allowed = F.pad(allowed, (0, 1), value=allowed.dtype == torch.bool)
        out = _masked(*_with_sink_key(q, k, v, sinks / scale), allowed, scale)
        return out[..., : v.shape[-1]]
    if mask.is_plain(k.shape[2], window):
        causal = False
        if q.shape[2] > 1:  # while torch.compile traces, the comparison itself is no bool
            causal = True
        return _of_one_width(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    return _masked(q, k, v, mask(k.shape[2], window), scale)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """`attend` to the keys that `allowed` says, broadcastable to [B, heads, T, S]."""
    groups = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:
        # One query a head: the heads that share keys become the rows of one product.
        rows = q.view(*k.shape[:2], groups, -1)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=allowed, scale=scale)
        return out.reshape(*q.shape[:3], -1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return _of_one_width(q, k, v, attn_mask=allowed, scale=scale)


def _of_one_width(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    """torch's attention. On a CPU it is one kernel only where keys are as wide as values; else it
    keeps the scores of all, and takes twenty times as long for a prompt of 512 tokens."""
    width = v.shape[-1]
    more = k.shape[-1] - width
    if more and q.is_cpu and q.shape[2] > 1:
        q, k, v = (F.pad(x, (0, max(0, side))) for x, side in ((q, -more), (k, -more), (v, more)))
    return F.scaled_dot_product_attention(q, k, v, **options)[..., :width]


SINK_DIMS = 8
"""Numbers that `_with_sink_key` adds to a head: as many as fused kernels want the width to be a
multiple of."""


def _with_sink_key(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v with SINK_DIMS numbers more a head, and one key more, of value 0: its product with
    a query is the number of the query's head in `sinks` [Hq].

    So any kernel of torch does attention with sinks. The other keys are 0 where the queries have
    the sinks, which are the sum of two numbers there, since 16 bits may not hold a quotient.
    """
    high = sinks.to(q.dtype)
    low = (sinks - high).to(q.dtype)
    more = F.pad(torch.stack((high, low), -1), (0, SINK_DIMS - 2))
    q = torch.cat((q, more[:, None].expand(*q.shape[:-1], SINK_DIMS)), -1)
    k, v = F.pad(k, (0, SINK_DIMS, 0, 1)), F.pad(v, (0, SINK_DIMS, 0, 1))
    k[..., -1, -SINK_DIMS : 2 - SINK_DIMS] = 1
    return q, k, v


class Keys(NamedTuple):
    """What the queries of a layer look at, in the form of the `Context` that made it.

    `values` is None where the values are among the numbers of the keys (latent attention).
    """

    keys: torch.Tensor
    values: torch.Tensor | None


class Context(Protocol):
    """The new tokens of a forward pass, as attention sees them: positions, cache and mask.

    `DenseContext` is a rectangle of tokens with transformers' caches. In the paged one of
    `moezoo.generation` B is 1, and the sequences lie one behind another along T.
    """

    rotation: Rotation
    num_queries: int
    """New tokens of a sequence, at most."""

    @property
    def positions(self) -> torch.Tensor:
        """int [1, T], which token of its sequence each new one is, padding before it counted."""
        ...

    def append_heads(
        self, attention: "GroupedQueryAttention", qkv: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, Keys]:
        """Queries [B, T, Hq, D] of qkv [B, T, (Hq + 2 Hk) D], and the keys with its own added."""
        ...

    def append_latents(
        self, attention: Any, q: torch.Tensor, latents: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, Keys]:
        """Queries with their last R numbers rotated, and the latents with the new ones added.

        q is [B, T, N, nope_dim + R], and may be changed; latents are [B, T, C + R] before norm and
        rotation.
        """
        ...

    def latents(self, keys: Keys) -> torch.Tensor:
        """What `append_latents` has of all tokens, [B, S, C + R]."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        keys: Keys,
        *,
        window: int | None = None,
        scale: float,
        value_dim: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax attention to what `append_..` returned, q [B, T, Hq, D] -> [B, T, Hq, Dv].

        Query head h reads key head h // (Hq / Hk). A query sees the `window` newest keys up to its
        own. Where keys have no values, their first `value_dim` numbers are. `sinks` [Hq] are one
        more score a head, of a key without a value.
        """
        ...

    def attend_to(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        shared_keys: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The same with keys and values [B, Hq, S, Dv] of all tokens: k [B, Hq, S, D - R], and
        shared_keys [B, S, R] the last numbers of all heads."""
        ...

    def attend_to_chosen(
        self, q: torch.Tensor, keys: Keys, chooser: Chooser, *, scale: float, value_dim: int
    ) -> torch.Tensor:
        """`attend` to those keys alone that the `chooser` chooses, by what is behind the numbers
        of keys that q is multiplied with."""
        ...

    def recur(
        self, layer: StateLayer, inputs: tuple[torch.Tensor, ...], layer_idx: int
    ) -> torch.Tensor:
        """What `layer.mix` makes of inputs [B, T, ..] -> [B, T, ..], going on from the states.

        Afterwards the states are those of the sequences with their new tokens.
        """
        ...

    def real_tokens(self) -> torch.Tensor | None:
        """bool [B * T], False for a place that no token fills; None where tokens fill all."""
        ...


def whole_keys(k: torch.Tensor, shared_keys: torch.Tensor) -> torch.Tensor:
    """k [B, N, S, D - R] with shared_keys [B, S, R] behind the numbers of each head,
    [B, N, S, D]."""
    dim = k.shape[-1]
    # Two copies: torch's cat takes three times as long for these on CUDA.
    whole = k.new_empty(*k.shape[:-1], dim + shared_keys.shape[-1])
    whole[..., :dim] = k
    whole[..., dim:] = shared_keys.unsqueeze(1)
    return whole


@dataclass(frozen=True)
class DenseContext:
    """T new tokens of each of B sequences; keys and values are [B, Hk, S, D]."""

    rotation: Rotation
    mask: CausalMask
    cache: LayerCache | None = None

    def to(self, device: torch.device) -> "DenseContext":
        """The same for layers on another device, whose part of the cache is there."""
        cos, sin = self.rotation
        return DenseContext((cos.to(device), sin.to(device)), self.mask.to(device), self.cache)

    @property
    def num_queries(self) -> int:
        return self.mask.length

    @property
    def positions(self) -> torch.Tensor:
        past = self.mask.past
        return torch.arange(past, past + self.mask.length, device=self.mask.device)[None]

    def append_heads(
        self, attention: "GroupedQueryAttention", qkv: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, Keys]:
        q, k, v = attention.heads(qkv, self.rotation)
        k, v = self._updated(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
        return q, Keys(k, v)

    def append_latents(
        self, attention: Any, q: torch.Tensor, latents: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, Keys]:
        stored = attention.stored(latents, self.rotation).unsqueeze(1)
        stored, _ = self._updated(stored, stored[..., :0], layer_idx)
        return attention.rotated(q, self.rotation), Keys(stored, None)

    def _updated(
        self, k: torch.Tensor, v: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k, v, layer_idx)
        if getattr(self.cache, "offloading", False):
            # It copies to pageable memory and back without waiting, and reads what is not there yet
            # where the layers between are fast.
            torch.cuda.synchronize(k.device)
        return k, v

    def latents(self, keys: Keys) -> torch.Tensor:
        return keys.keys.squeeze(1)

    def attend(
        self,
        q: torch.Tensor,
        keys: Keys,
        *,
        window: int | None = None,
        scale: float,
        value_dim: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Fused kernels want equal widths: numbers that are no values come along as such.
        k, v = keys.keys, keys.keys if keys.values is None else keys.values
        out = attend(q.transpose(1, 2), k, v, self.mask, window=window, scale=scale, sinks=sinks)
        return (out if value_dim is None else out[..., :value_dim]).transpose(1, 2)

    def attend_to(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        shared_keys: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        k = whole_keys(k, shared_keys)
        return attend(q.transpose(1, 2), k, v, self.mask, scale=scale).transpose(1, 2)

    def attend_to_chosen(
        self, q: torch.Tensor, keys: Keys, chooser: Chooser, *, scale: float, value_dim: int
    ) -> torch.Tensor:
        stored = keys.keys.squeeze(1)
        allowed = self.mask(stored.shape[1], None)
        return attend_to_chosen(q, stored, allowed, chooser, scale=scale, dim=value_dim)

    def recur(
        self, layer: StateLayer, inputs: tuple[torch.Tensor, ...], layer_idx: int
    ) -> torch.Tensor:
        states = None if self.cache is None else cached_states(self.cache, layer_idx)
        if states is None:
            states = no_states(layer, len(inputs[0]), inputs[0])
        out, states = layer.mix(inputs, states, self._real)
        if self.cache is not None:
            cache_states(self.cache, layer_idx, states)
        return out

    @cached_property
    def _real(self) -> torch.Tensor | None:
        """`real_tokens` as [B, T]."""
        real = self.real_tokens()
        if real is None or (not torch.compiler.is_compiling() and real.all()):
            return None
        return real.view(-1, self.mask.length)

    def real_tokens(self) -> torch.Tensor | None:
        visible = self.mask.visible
        if visible is None or visible.dim() == 4:
            return None
        return visible[:, self.mask.past : self.mask.past + self.mask.length].flatten()


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share key and value heads, of width `head_dim` and `value_dim`.

    `q_norm` and `k_norm` normalise each head (width `head_dim`) or all heads at once (width
    heads * `head_dim`) before the rotation. `window` limits a query to that many newest keys, its
    own included, or to those of its chunk if it is `Chunked`. `clip` bounds queries, keys and
    values to [-clip, clip] before the rotation. `rotate` is a function of `moezoo.layers.rope`, and
    `part` what it takes of the rotation, where that is of several kinds. `scale` multiplies the
    scores, by default 1 / sqrt(`head_dim`). `sinks` [Hq], a parameter, are one more score a head,
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
        self.clip = clip
        self.rotate = rotate
        self.part = part
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sinks = sinks

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """What a cache keeps of a token: keys and values, each [heads, width]."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.value_dim)

    def own(self, rotation: Rotation) -> Rotation:
        """What the layer takes of a rotation that may be of several kinds."""
        if self.part is None:
            return rotation
        cos, sin = rotation
        return cos[..., self.part], sin[..., self.part]

    @property
    def has_usual_heads(self) -> bool:
        """Whether the kernel that rotates and stores does what `heads` does."""
        return type(self).heads is GroupedQueryAttention.heads

    def forward(
        self, x: torch.Tensor | NormOfSum, context: Context, layer_idx: int
    ) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]; keys and values go to the cache under `layer_idx`."""
        project = self.qkv
        qkv = project(handed_to(project, x))
        return self.o(self.attended(qkv, context, layer_idx).flatten(2))

    def attended(self, qkv: torch.Tensor, context: Context, layer_idx: int) -> torch.Tensor:
        """qkv [B, T, ..] -> what its queries find, [B, T, Hq, Dv]; the cache gets its keys."""
        q, keys = context.append_heads(self, qkv, layer_idx)
        return context.attend(q, keys, window=self.window, scale=self.scale, sinks=self.sinks)

    def heads(
        self, qkv: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv [B, T, ..] -> q [B, T, Hq, D], k [B, T, Hk, D] and v [B, T, Hk, Dv]; normed, clipped
        and rotated."""
        # Queries and keys are rotated together: on a CPU a token's time is the number of calls.
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
        qk = self.rotate(qk, self.own(rotation))
        q, k = qk.split_with_sizes((self.num_heads, self.num_kv_heads), 2)
        return q, k, v

"""What attention knows of the new tokens of a forward pass: positions, cache and mask.

Legend: B batch, T new tokens, S keys (cached and new), Hq query heads, Hk key heads, D key width,
Dv value width, N heads, C latent width, R rotated width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch

from moezoo.layers.chosen_keys import Chooser, attend_to_chosen
from moezoo.layers.mask import CausalMask
from moezoo.layers.rope import Rotation
from moezoo.layers.softmax_attention import attend
from moezoo.layers.states import StateLayer, cache_states, cached_states, no_states


class LayerCache(Protocol):
    """What attention asks of a KV cache; every `transformers.Cache` has it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, D] keys and values; return those that the new queries may see."""
        ...


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
        self, attention: Any, qkv: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, Keys]:
        """Add the new tokens' keys and values to the layer's.

        `attention` is a `GroupedQueryAttention`, qkv [B, T, (Hq + Hk) D + Hk Dv] its projections.
        Returns the rotated queries [B, T, Hq, D], and all keys and values so far.
        """
        ...

    def append_latents(
        self, attention: Any, q: torch.Tensor, latents: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, Keys]:
        """Norm and rotate the new tokens' latents and add them to the layer's.

        `attention` is a `MultiHeadLatentAttention`; latents are [B, T, C + R] before norm and
        rotation. Returns q [B, T, N, nope_dim + R] with its last R numbers rotated, perhaps in
        place, and all latents so far.
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
        self, attention: Any, qkv: torch.Tensor, layer_idx: int
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

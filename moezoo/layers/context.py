"""Contexts: the new tokens' positions, cache and mask in a forward pass, as attention sees them.

Legend: B batch, T new tokens, S keys (cached and new), Hq query heads, Hk key heads, D key width,
Dv value width, N heads, C latent width, R rotated width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch

from moezoo.layers.chosen_keys import Chooser, attend_to_chosen
from moezoo.layers.mask import CausalMask, text_numbers
from moezoo.layers.rope import Rotation
from moezoo.layers.softmax_attention import attend
from moezoo.layers.states import StateLayer, cache_states, cached_states, no_states


class LayerCache(Protocol):
    """The part of `transformers.Cache` that attention needs."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, T, D]; return those that the new queries may see."""
        ...


class Keys(NamedTuple):
    """The keys and values that a layer's queries attend to, as the `Context` that made them stores
    them.

    `values` is None where the values are the first numbers of the keys (latent attention).
    """

    keys: torch.Tensor
    values: torch.Tensor | None


class Context(Protocol):
    """The new tokens of a forward pass, as attention sees them: positions, cache and mask.

    `DenseContext` has a rectangle of tokens and transformers' caches. In the paged contexts of
    `moezoo.generation` B is 1, and sequences lie one after the other along T.
    """

    rotation: Rotation
    num_queries: int
    """Largest number of new tokens in a sequence."""

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the new tokens in their sequences, int [B or 1, T], counting padding before
        them."""
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
        """Return the latents of all tokens that `append_latents` returned, [B, S, C + R]."""
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
        """Compute softmax attention to keys that an `append_..` returned, q [B, T, Hq, D]
        -> [B, T, Hq, Dv].

        Query head h reads key head h // (Hq / Hk). A query sees the `window` newest keys up to its
        own. Where `keys.values` is None, the first `value_dim` numbers of each key are its value.
        `sinks` [Hq] are an extra score for each head, that of a key without a value.
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
        """Compute softmax attention to the given keys and values of all tokens, q [B, T, Hq, D]
        -> [B, T, Hq, Dv].

        k [B, Hq, S, D - R] are the first numbers of the keys and shared_keys [B, S, R] the last
        ones, which all heads share; v is [B, Hq, S, Dv].
        """
        ...

    def attend_to_chosen(
        self, q: torch.Tensor, keys: Keys, chooser: Chooser, *, scale: float, value_dim: int
    ) -> torch.Tensor:
        """Compute `attend` over the keys that the `chooser` chooses, by the numbers of each key
        that follow those that q is multiplied with."""
        ...

    def recur(
        self, layer: StateLayer, inputs: tuple[torch.Tensor, ...], layer_idx: int
    ) -> torch.Tensor:
        """Run `layer.mix` on inputs [B, T, ..] from the sequences' states, return its output
        [B, T, ..], and store the states after the new tokens."""
        ...

    def real_tokens(self) -> torch.Tensor | None:
        """Return bool [B * T], False for places without a token, or None if all have one."""
        ...


def whole_keys(k: torch.Tensor, shared_keys: torch.Tensor) -> torch.Tensor:
    """Append shared_keys [B, S, R] to each head of k [B, N, S, D - R]; return [B, N, S, D]."""
    dim = k.shape[-1]
    # On CUDA torch's cat takes three times as long as two copies.
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
        """Return the context for layers on another device, whose part of the cache is there."""
        cos, sin = self.rotation
        return DenseContext((cos.to(device), sin.to(device)), self.mask.to(device), self.cache)

    @property
    def num_queries(self) -> int:
        return self.mask.length

    @property
    def positions(self) -> torch.Tensor:
        if self.mask.packed is not None:
            return self.mask.packed
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
            # An offloading cache copies to pageable memory and back without waiting, and where the
            # layers between are fast it reads what has not arrived yet.
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
        # Fused kernels need values as wide as keys, so latents are values whole and cut afterwards.
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
        stored = self.latents(keys)
        allowed = self.mask(stored.shape[1], None)
        return attend_to_chosen(q, stored, allowed, chooser, scale=scale, dim=value_dim)

    def recur(
        self, layer: StateLayer, inputs: tuple[torch.Tensor, ...], layer_idx: int
    ) -> torch.Tensor:
        if self.mask.packed is not None:
            return self._recur_in_texts(layer, inputs)
        states = None if self.cache is None else cached_states(self.cache, layer_idx)
        if states is None:
            states = no_states(layer, len(inputs[0]), inputs[0])
        out, states = layer.mix(inputs, states, self._real)
        if self.cache is not None:
            cache_states(self.cache, layer_idx, states)
        return out

    def _recur_in_texts(self, layer: StateLayer, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run `layer.mix` on each text of packed rows, from no states."""
        rows = []
        for row in range(len(inputs[0])):
            lengths = self._text_lengths[row % len(self._text_lengths)]
            pieces = zip(*(x[row, None].split(lengths, 1) for x in inputs), strict=True)
            mixed = (layer.mix(x, no_states(layer, 1, inputs[0]), None)[0] for x in pieces)
            rows.append(torch.cat(list(mixed), 1))
        return torch.cat(rows)

    @cached_property
    def _text_lengths(self) -> list[list[int]]:
        """Numbers of tokens of the texts in each packed row, or of those in every row alike."""
        assert self.mask.packed is not None
        return [texts.bincount().tolist() for texts in text_numbers(self.mask.packed)]

    @cached_property
    def _real(self) -> torch.Tensor | None:
        """`real_tokens` as [B, T], None if there is no padding."""
        real = self.real_tokens()
        if real is None or (not torch.compiler.is_compiling() and real.all()):
            return None
        return real.view(-1, self.mask.length)

    def real_tokens(self) -> torch.Tensor | None:
        visible = self.mask.visible
        if visible is None or visible.dim() == 4:
            return None
        return visible[:, self.mask.past : self.mask.past + self.mask.length].flatten()

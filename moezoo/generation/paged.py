"""A paged KV cache, and attention to it in decode steps; that of prompts is in `prompts`.

Sequences lie one behind another, without padding: B is 1 in every [B, T, ..] of the layers. The
slot page * PAGE_SIZE + offset of a layer's tensors holds one token. Layers with a sliding window
have pages of their own, a ring for each row of the batch, with room for the window and the longest
chunk of a prompt. Layers with a state have no pages, and a state for each row.

Legend: T new tokens, S keys (cached and new), R rows, P pages of a row, Hq query heads, Hk key
heads, D head width, C latent width, R rotated width (in C + R).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from moezoo.device import runs_kernels
from moezoo.generation.cache import growing_cache
from moezoo.generation.pages import PAGE_SIZE, num_pages
from moezoo.layers.attention import GroupedQueryAttention
from moezoo.layers.chosen_keys import Chooser, attend_to_chosen
from moezoo.layers.context import Keys, whole_keys
from moezoo.layers.decoder import Decoder
from moezoo.layers.kernels.windows import first_key
from moezoo.layers.mask import CausalMask
from moezoo.layers.mixer import SequenceMixer, state_bytes
from moezoo.layers.mla import MultiHeadLatentAttention
from moezoo.layers.rope import Rotation, rotate_interleaved, unrotated
from moezoo.layers.softmax_attention import attend
from moezoo.layers.states import StateLayer, States

Window = int | None


def attentions(decoder: Decoder) -> list[SequenceMixer]:
    """Return what stands in the layers' attention places, in the order of their caches; a layer may
    have several."""
    found: list[Any] = []
    for layer in decoder.layers:
        found.extend(layer.attn if isinstance(layer.attn, nn.ModuleList) else [layer.attn])
    return found


def counts_padding(decoder: Decoder) -> bool:
    """Whether the result of a layer depends on the padding before a sequence."""
    return any(attention.counts_padding for attention in attentions(decoder))


def windows(decoder: Decoder) -> list[Window]:
    """Return the sliding window of each mixer, None for those without."""
    return [attention.window for attention in attentions(decoder)]


def token_bytes(decoder: Decoder, window: Window = None) -> int:
    """Return the bytes that a token takes in all layers with this window."""
    numbers = sum(
        heads * width
        for attention, own in zip(attentions(decoder), windows(decoder), strict=True)
        for heads, width in attention.cache_shapes
        if own == window
    )
    return numbers * decoder.embed.weight.dtype.itemsize


def row_state_bytes(decoder: Decoder) -> int:
    """Return the bytes of a row's states in all layers."""
    return state_bytes(attentions(decoder), decoder.embed.weight.dtype)


def ring_pages(window: int, *, context: int, chunk: int) -> int:
    """Return the number of pages in a row's ring: room for a window and the chunk that follows."""
    return min(num_pages(window + chunk) + 1, num_pages(context))


class PagedCache:
    """Keys and values of all layers, each [slots, Hk, D] in the model's dtype, and states.

    `pages` is the number of pages of each layer without a window; in a layer with a window of w
    each of the `num_rows` rows has `ring_pages(w, ..)` pages of its own. states[layer] are [R, ..].
    Memory is not initialised: a row's states before its first tokens mean nothing.
    """

    def __init__(
        self, decoder: Decoder, *, pages: int, num_rows: int, context: int, chunk: int
    ) -> None:
        weight = decoder.embed.weight
        self.layers: list[Keys] = []
        self.states: list[States] = []
        for attention, window in zip(attentions(decoder), windows(decoder), strict=True):
            states = (
                weight.new_empty(num_rows, *shape, dtype=dtype or weight.dtype)
                for shape, dtype in attention.state_shapes
            )
            self.states.append(tuple(states))
            total = pages
            if window is not None:
                total = num_rows * ring_pages(window, context=context, chunk=chunk)
            stored = [
                weight.new_empty(total * PAGE_SIZE, heads, width)
                for heads, width in attention.cache_shapes or ((0, 0),)
            ]
            self.layers.append(Keys(stored[0], stored[1] if len(stored) == 2 else None))

    @property
    def nbytes(self) -> int:
        tensors = (x for layer in (*self.layers, *self.states) for x in layer if x is not None)
        return sum(x.nbytes for x in tensors)

    @torch.inference_mode()
    def dense(
        self, config: PreTrainedConfig, table: Tensor, lengths: Sequence[int]
    ) -> DynamicCache:
        """Return a cache of transformers with the first `lengths` tokens of rows 0, 1, ...

        `table` int [R, P] has the pages of each row. The cache is padded on the left with zeros.
        For decoders without sliding windows and states only.
        """
        cache = growing_cache(config)
        width = max(lengths)
        ends = torch.tensor(lengths, device=table.device)[:, None]
        positions = torch.arange(width, device=table.device) - width + ends
        slots = slots_of(table[: len(lengths)], positions.clamp(min=0))
        hidden = (positions < 0)[..., None, None]
        for layer_idx, stored in enumerate(self.layers):
            keys, values = (
                None if x is None else x[slots].masked_fill(hidden, 0).transpose(1, 2)
                for x in stored
            )
            assert keys is not None
            cache.update(keys, keys[..., :0] if values is None else values, layer_idx)
        return cache


class PagedContext:
    """The base of the contexts of prompts and decode steps: how keys get into the pages."""

    rotation: Rotation
    cache: PagedCache
    slots: dict[Window, Tensor]
    """The slot of each new token, int64 [T]; -1 for a token that is not stored (on CUDA only)."""

    def real_tokens(self) -> Tensor | None:
        return self.slots[None] >= 0

    def append_heads(
        self, attention: GroupedQueryAttention, qkv: Tensor, layer_idx: int
    ) -> tuple[Tensor, Keys]:
        pages = self.cache.layers[layer_idx]
        slots = self.slots[attention.window]
        assert pages.values is not None
        if runs_kernels(qkv):
            from moezoo.layers.kernels.rotate_store import rotate_and_store

            if not attention.has_usual_heads:
                heads = attention.heads(qkv, self.rotation)
                rows = torch.cat([x[0].flatten(1) for x in heads], -1)
                q = rotate_and_store(
                    rows,
                    None,
                    slots,
                    pages.keys,
                    pages.values,
                    num_heads=attention.num_heads,
                    num_kv_heads=attention.num_kv_heads,
                )
                return q[None], pages
            norms = attention.q_norm, attention.k_norm
            q = rotate_and_store(
                qkv[0],
                None if attention.rotate is unrotated else attention.own_rotation(self.rotation),
                slots,
                pages.keys,
                pages.values,
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                q_weight=None if norms[0] is None else norms[0].weight,
                k_weight=None if norms[1] is None else norms[1].weight,
                eps=0.0 if norms[0] is None else norms[0].eps,
                offset=0.0 if norms[0] is None else norms[0].offset,
                clip=attention.clip,
                interleaved=attention.rotate is rotate_interleaved,
            )
            return q[None], pages
        q, k, v = attention.heads(qkv, self.rotation)
        pages.keys.index_copy_(0, slots, k[0])
        pages.values.index_copy_(0, slots, v[0])
        return q, pages

    def append_latents(
        self, attention: MultiHeadLatentAttention, q: Tensor, latents: Tensor, layer_idx: int
    ) -> tuple[Tensor, Keys]:
        pages = self.cache.layers[layer_idx]
        if runs_kernels(latents) and attention.has_usual_latents:
            from moezoo.layers.kernels.latent_store import latent_store

            latent_store(
                q[0],
                latents[0],
                self.rotation,
                self.slots[None],
                pages.keys,
                norm_weight=attention.kv_norm.weight,
                eps=attention.kv_norm.eps,
                interleaved=attention.rotate is rotate_interleaved,
                out=q[0],
            )
            return q, pages
        stored = attention.stored(latents, self.rotation)
        slots, rows = self.slots[None], stored[0, :, None]
        if slots.is_cuda:
            slots, rows = slots[slots >= 0], rows[slots >= 0]
        pages.keys.index_copy_(0, slots, rows)
        return attention.rotated(q, self.rotation), pages


@dataclass(frozen=True)
class DecodeContext(PagedContext):
    """The context of a decode step: one new token for each of T rows.

    tables[window] int32 [T, P] has the pages of each row. lengths int32 [T] counts its tokens, the
    new one included, and is 0 for a row without a sequence (on CUDA only).
    """

    rotation: Rotation
    cache: PagedCache
    slots: dict[Window, Tensor]
    tables: dict[Window, Tensor]
    lengths: Tensor
    num_queries: int = 1

    @property
    def positions(self) -> Tensor:
        return self.lengths[None] - 1

    def latents(self, keys: Keys) -> Tensor:
        """Return the latents of each row's tokens, [T, S, C + R], padded on the left."""
        index, _ = self._padded[None]
        return keys.keys[index].squeeze(2)

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, *, shared_keys: Tensor, scale: float
    ) -> Tensor:
        _, mask = self._padded[None]
        k = whole_keys(k, shared_keys)
        out = attend(q.squeeze(0).unsqueeze(2), k, v, mask, scale=scale)
        return out.squeeze(2).unsqueeze(0)

    def attend(
        self,
        q: Tensor,
        keys: Keys,
        *,
        window: int | None = None,
        scale: float,
        value_dim: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if runs_kernels(q, sinks):
            from moezoo.layers.kernels.decode_attention import decode_attention

            return decode_attention(
                q[0],
                keys.keys,
                keys.values,
                self.tables[window],
                self.lengths,
                page_size=PAGE_SIZE,
                scale=scale,
                value_dim=value_dim,
                window=window,
                sinks=sinks,
            )[None]
        index, mask = self._padded[window]
        k = keys.keys[index].transpose(1, 2)  # [T, Hk, S, D]
        v = k if keys.values is None else keys.values[index].transpose(1, 2)
        out = attend(q.squeeze(0).unsqueeze(2), k, v, mask, scale=scale, sinks=sinks)
        return out[..., :value_dim].squeeze(2).unsqueeze(0)

    def attend_to_chosen(
        self, q: Tensor, keys: Keys, chooser: Chooser, *, scale: float, value_dim: int
    ) -> Tensor:
        _, mask = self._padded[None]
        stored = self.latents(keys)
        chooser = chooser.transposed()
        allowed = mask(stored.shape[1], None)
        q = q.transpose(0, 1)
        out = attend_to_chosen(q, stored, allowed, chooser, scale=scale, dim=value_dim)
        return out.transpose(0, 1)

    def recur(self, layer: StateLayer, inputs: tuple[Tensor, ...], layer_idx: int) -> Tensor:
        states = tuple(state[: len(self.lengths)] for state in self.cache.states[layer_idx])
        out, after = layer.mix(tuple(x.transpose(0, 1) for x in inputs), states, self._used)
        for state, new in zip(states, after, strict=True):
            if new is not state:
                state.copy_(new)
        return out.transpose(0, 1)

    @cached_property
    def _used(self) -> Tensor:
        """Whether each row has a sequence, bool [T, 1]."""
        return (self.lengths > 0)[:, None]

    @cached_property
    def _padded(self) -> dict[Window, tuple[Tensor, CausalMask]]:
        """Slots of the keys that each row sees, int64 [T, S], padded on the left, and a mask."""
        longest = int(self.lengths.max())
        found = {}
        for window, table in self.tables.items():
            width = longest if window is None else min(window, longest)
            at = self.lengths[:, None] - width + torch.arange(width, device=table.device)
            visible = at >= 0
            if window is not None:
                visible &= at >= first_key(self.lengths[:, None] - 1, window)
            slots = slots_of(table, at.clamp(min=0))
            mask = CausalMask(width - 1, 1, table.device, None if visible.all() else visible)
            found[window] = slots, mask
        return found


def slots_of(table: Tensor, positions: Tensor) -> Tensor:
    """Return the slots, int64 [R, n], of positions [R, n] in rows whose pages are table [R, P]."""
    return table.long().gather(1, positions // PAGE_SIZE) * PAGE_SIZE + positions % PAGE_SIZE

"""Key-value caches that grow in place.

transformers' `DynamicCache` copies all keys and values at every token to append one. Here a layer
keeps room to spare and doubles it when it is full; everything else is transformers' own, so the
cache works wherever a `transformers.Cache` does.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

MIN_CAPACITY = 64


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, S, D] of one layer: views of buffers with room for more tokens."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, T, D]; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.keys.shape[2]
        new = old + key_states.shape[2]
        if not self._has_room(new):
            capacity = max(MIN_CAPACITY, 2 * old, new)
            self._buffers = (
                _moved(self.keys, key_states, capacity),
                _moved(self.values, value_states, capacity),
            )
        assert self._buffers is not None
        keys, values = self._buffers
        keys.narrow(2, old, new - old).copy_(key_states)
        values.narrow(2, old, new - old).copy_(value_states)
        self.keys = keys.narrow(2, 0, new)
        self.values = values.narrow(2, 0, new)
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """Whether the buffers may be written and still hold the present keys.

        Beam search replaces the keys; what inference mode made is read-only outside it.
        """
        if self._buffers is None:
            return False
        keys, _ = self._buffers
        if keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        shared = self.keys.data_ptr() == keys.data_ptr() and self.keys.shape[0] == keys.shape[0]
        return shared and length <= keys.shape[2]


def _moved(old: torch.Tensor, like: torch.Tensor, capacity: int) -> torch.Tensor:
    """A buffer [B, heads, capacity, D] that begins with `old`."""
    batch, heads, _, width = like.shape
    buffer = like.new_empty(batch, heads, capacity, width)
    buffer[:, :, : old.shape[2]] = old
    return buffer


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """transformers' cache for `config`, its full-attention layers growing in place.

    Sliding layers are transformers' own: they keep their window only, which is short.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(old) is DynamicLayer else old for old in cache.layers]
    return cache

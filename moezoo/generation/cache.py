"""Key-value caches that grow in place.

transformers' `DynamicCache` copies all keys and values at every token to append one. Here a layer
keeps room to spare and doubles it when it is full; everything else is transformers' own, so the
cache works wherever a `transformers.Cache` does.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

MIN_CAPACITY = 64


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [B, heads, S, D]: views of buffers with room for more tokens."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, T, D], and return all that the layer has."""
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
        """Whether the buffers hold the present keys, have room for `length`, and may be written.

        Beam search replaces the keys; tensors made in inference mode are read-only outside it.
        """
        if self._buffers is None:
            return False
        keys, _ = self._buffers
        if keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        shared = self.keys.data_ptr() == keys.data_ptr() and self.keys.shape[0] == keys.shape[0]
        return shared and length <= keys.shape[2]


class ReplacedStates(LinearAttentionLayer):
    """One layer's states, which are replaced instead of overwritten as transformers does.

    Tensors made in inference mode could not be overwritten outside it.
    """

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        """Keep the newest inputs [B, C, W] of a convolution."""
        self.dtype, self.device = conv_states.dtype, conv_states.device
        self.conv_kernel_size[state_idx] = conv_states.shape[-1]
        self.conv_states[state_idx] = conv_states
        self.is_conv_states_initialized[state_idx] = True
        self.has_previous_state[state_idx] = True
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


def _moved(old: torch.Tensor, like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return a buffer [B, heads, capacity, D] that begins with `old`."""
    batch, heads, _, width = like.shape
    buffer = like.new_empty(batch, heads, capacity, width)
    buffer[:, :, : old.shape[2]] = old
    return buffer


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return transformers' cache for `config`, with full-attention layers that grow in place.

    Sliding layers are transformers' own, which keep only their short window.
    """
    ours = {DynamicLayer: GrowingLayer, LinearAttentionLayer: ReplacedStates}
    cache = DynamicCache(config=config)
    cache.layers = [ours[type(old)]() if type(old) in ours else old for old in cache.layers]
    return cache

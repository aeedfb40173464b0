"""Counters of what a decoder's routers choose, on the device.

Nothing here waits for the device, and all but `keeps_choices` can be part of a captured graph.

Legend: T tokens, K experts per token, L MoE layers, E experts, S forward passes that are kept,
B bins.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RoutingRecorder(nn.Module):
    """Counters for L layers. It is a module of the decoder, which calls `begin`; layers call `add`.

    Args:
        history: S, number of forward passes whose loads are kept one by one.
        bins: B, number of bins in the histogram of scores.
        keeps_choices: whether each layer's ids and weights are kept, token by token, on the device.
            Steps are then not captured.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        history: int,
        bins: int,
        keeps_choices: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.prevents_capture = keeps_choices
        self.choices: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]
        """For each layer the topk_ids and topk_weights [T, K] of each forward pass."""
        self._real: Tensor | None = None
        self._row = torch.zeros(1, dtype=torch.int64, device=device)

        def counter(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # The last dimension has one entry more, where padding is counted.
        for name, tensor in {
            "passes": counter(1),
            "load": counter(num_layers, num_experts + 1),
            "history": counter(history, num_layers, num_experts + 1, dtype=torch.int32),
            "scores": counter(num_layers, bins + 1),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    passes: Tensor
    load: Tensor
    history: Tensor
    scores: Tensor

    def begin(self, real: Tensor | None) -> None:
        """Begin a forward pass; `real` is bool [T], False at padding, or None without padding."""
        self._real = real
        self._row = self.passes % len(self.history)
        self.history.index_fill_(0, self._row, 0)
        self.passes += 1

    def add(self, layer: int, topk_weights: Tensor, topk_ids: Tensor) -> None:
        """Count what a layer chose, [T, K] each; ids of -1, no expert, are not counted."""
        device = self.load.device  # a layer may be on another
        topk_weights, topk_ids = topk_weights.detach().to(device), topk_ids.to(device)
        ids = topk_ids.long()
        counts = ids >= 0
        if self._real is not None:
            counts = counts & self._real[:, None]
        ids = torch.where(counts, ids, self.num_experts).flatten()
        ones = torch.ones_like(ids)
        self.load[layer].scatter_add_(0, ids, ones)
        width = self.history[0].numel()
        places = ids + (self._row * width + layer * (self.num_experts + 1))
        self.history.view(-1).scatter_add_(0, places, ones.int())

        bins = self.scores.shape[1] - 1
        share = topk_weights / topk_weights.sum(-1, keepdim=True)
        bin_ids = (share.nan_to_num() * bins).long().clamp(0, bins - 1)
        self.scores[layer].scatter_add_(0, torch.where(counts, bin_ids, bins).flatten(), ones)
        if self.prevents_capture:
            kept = slice(None) if self._real is None else self._real
            self.choices[layer].append((topk_ids[kept].clone(), topk_weights[kept].clone()))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Forget what is recorded within: passes whose results are not used."""
        before = [buffer.clone() for buffer in self.buffers()]
        lengths = [len(choices) for choices in self.choices]
        yield
        for buffer, old in zip(self.buffers(), before, strict=True):
            buffer.copy_(old)
        for choices, length in zip(self.choices, lengths, strict=True):
            del choices[length:]

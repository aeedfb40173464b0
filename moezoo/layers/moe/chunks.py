"""What all kinds of experts share: chunks of tokens, ids of other ranks' experts, operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 16384
"""Largest number of tokens worked on at a time: enough to fill a GPU. It limits
`workspace_bytes`."""


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Map topk_ids to rows of this process' w13 and w2, -1 where another process has the expert."""
    if expert_map is None:
        return topk_ids
    return expert_map[topk_ids.clamp(min=0)].where(topk_ids >= 0, -1)


def in_chunks(
    chunk: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """Call chunk(x, topk_weights, topk_ids) for up to CHUNK_TOKENS tokens at a time, and
    concatenate the results."""
    if x.shape[0] <= CHUNK_TOKENS:
        return chunk(x, topk_weights, topk_ids)
    parts = (tensor.split(CHUNK_TOKENS) for tensor in (x, topk_weights, topk_ids))
    return torch.cat([chunk(*part) for part in zip(*parts, strict=True)])


def operator(name: str, on_cpu: Callable[..., Tensor], on_cuda: Callable[..., Tensor]) -> Any:
    """Make a custom operator of the two functions: one call to a compiler, whose result has the
    shape and dtype of x."""
    op = torch.library.custom_op(name, on_cpu, mutates_args=(), device_types="cpu")
    op.register_kernel("cuda", on_cuda)
    op.register_fake(lambda x, *_, **__: x.new_empty(x.shape))
    return op

"""The implementations that `layer.py` measures beside moezoo: same weights, same logits, bf16.

Each takes w13 [E, 2I, H] (gate rows, then up rows), w2 [E, H, I] and K, and gives a function from
tokens [T, H] and router logits [T, E] fp32 to [T, H].
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.tools.layer import Implementation
from moezoo.tools.layer_weights import Layer

MAX_BATCHED_TOKENS = 64
MAX_BATCHED_BYTES = 12e9


def torch_grouped_mm(w13: Tensor, w2: Tensor, k: int) -> Implementation:
    """Return the layer on torch's grouped product between a sort and a gather.

    Weights and sum are one product.
    """
    num_experts = w13.shape[0]
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def run(x: Tensor, logits: Tensor) -> Tensor:
        chosen, ids = logits.topk(k)
        weights = chosen.softmax(-1).to(x.dtype)
        sorted_ids, order = ids.flatten().sort()
        experts = torch.arange(num_experts, device=x.device)
        offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
        gate, up = grouped_mm(x[order // k], w13.mT, offs=offsets).chunk(2, -1)
        y = grouped_mm(F.silu(gate).mul_(up), w2.mT, offs=offsets)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=x.device)
        return (weights.unsqueeze(1) @ y[places].unflatten(0, (-1, k))).squeeze(1)

    return run


def in_transformers(implementation: str) -> Callable[[Tensor, Tensor, int], Implementation]:
    """Return the layer on transformers' own experts, after the router of its Qwen3-MoE."""

    def build(w13: Tensor, w2: Tensor, k: int) -> Implementation:
        from transformers.integrations.moe import use_experts_implementation

        @use_experts_implementation
        class Experts(nn.Module):
            def __init__(self, config: SimpleNamespace) -> None:
                super().__init__()
                self.num_experts = w13.shape[0]
                self.hidden_dim, self.intermediate_dim = w2.shape[1:]
                self.gate_up_proj = nn.Parameter(w13, requires_grad=False)
                self.down_proj = nn.Parameter(w2, requires_grad=False)
                self.act_fn = nn.SiLU()

            def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
                raise AssertionError("transformers did not take the implementation asked for")

        experts = Experts(SimpleNamespace(_experts_implementation=implementation))

        def run(x: Tensor, logits: Tensor) -> Tensor:
            weights, ids = logits.softmax(-1, dtype=torch.float32).topk(k)
            return experts(x, ids, weights / weights.sum(-1, keepdim=True))

        return run

    return build


def triton_kernels(w13: Tensor, w2: Tensor, k: int) -> Implementation:
    from peer_triton_kernels import triton_kernels_layer

    return triton_kernels_layer(w13, w2, k)


PEERS: dict[str, Callable[[Tensor, Tensor, int], Implementation]] = {
    "triton_kernels": triton_kernels,
    "torch_grouped_mm": torch_grouped_mm,
    "hf_grouped_mm": in_transformers("grouped_mm"),
    "hf_batched_mm": in_transformers("batched_mm"),
}


def unfit(peer: str, layer: Layer, num_tokens: int) -> str | None:
    """Return why a peer is not tried on so many tokens; None if it is."""
    if peer != "hf_batched_mm":
        return None
    if num_tokens > MAX_BATCHED_TOKENS:
        return f"copies an expert for each row; measured up to {MAX_BATCHED_TOKENS} tokens"
    nbytes = 2 * num_tokens * layer.k * layer.expert_elements
    if nbytes > MAX_BATCHED_BYTES:
        return f"copies an expert for each row, {nbytes / 1e9:.0f} GB"
    return None

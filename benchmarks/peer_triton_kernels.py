"""triton_kernels, the ragged matrix products of the Triton project, as a peer in `layer.py`.

It has no release of its own (`triton-kernels` on PyPI is something else); vLLM's wheel carries it,
and `pack_triton_kernels.py` makes a wheel of that part. Called as vLLM calls it: routing, a product
that gathers its rows and activates in its epilogue, a product that weights, scatters and sums them.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs
from triton_kernels.routing import (
    GatherIndx,
    RoutingData,
    ScatterIndx,
    compute_expt_data,
    routing,
)


@triton.jit(repr=lambda _: "_silu_and_mul")
def silu_and_mul(input):
    """What the package's own `swiglu_fn` does, without adding 1 to the up half."""
    gate, up = tl.split(tl.reshape(input, (input.shape[0], input.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up.to(tl.float32)


ACTIVATION = FusedActivation(FnSpecs("silu_and_mul", silu_and_mul, ()), (), 2)


def triton_kernels_layer(w13: Tensor, w2: Tensor, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the layer on w13 [E, 2I, H], copied with alternating gate and up rows, and w2."""
    num_experts, rows, hidden_size = w13.shape
    alternating = torch.empty_like(w13).view(num_experts, rows // 2, 2, hidden_size)
    alternating[:, :, 0].copy_(w13[:, : rows // 2])
    alternating[:, :, 1].copy_(w13[:, rows // 2 :])
    return layer(alternating.view_as(w13).mT, w2.mT, k)


def layer(b13: Tensor, b2: Tensor, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the layer on b13 [E, H, 2I], gate and up columns alternating, and b2 [E, I, H]."""
    route = routing if k & (k - 1) == 0 else _routing_in_torch

    def run(x: Tensor, logits: Tensor) -> Tensor:
        data, gather, scatter = route(logits, k)
        h = matmul_ogs(x, b13, None, data, gather_indx=gather, fused_activation=ACTIVATION)
        return matmul_ogs(h, b2, None, data, scatter_indx=scatter, gammas=data.gate_scal)

    return run


def _routing_in_torch(logits: Tensor, k: int) -> tuple[Any, Any, Any]:
    """Compute `routing` for a k that is no power of two, which the package cannot."""
    num_experts = logits.shape[1]
    chosen, ids = logits.topk(k)
    ids = ids.flatten().int()
    order = ids.sort(stable=True).indices.int()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    sizes = torch.histc(ids, bins=num_experts, min=0, max=num_experts - 1).int()
    weights = chosen.softmax(-1).flatten()[order]
    data = compute_expt_data(sizes, num_experts, len(order))
    return (
        RoutingData(weights, sizes, num_experts, k, data),
        GatherIndx(order, inverse),
        ScatterIndx(inverse, order),
    )

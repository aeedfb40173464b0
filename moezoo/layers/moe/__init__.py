"""The MoE layer as four verbs: route, permute, experts, combine."""

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.moe.experts import fused_experts, workspace_bytes
from moezoo.layers.moe.layer import (
    Arrival,
    BiasedLogits,
    BiasedRoute,
    Dispatcher,
    Flight,
    FusedMoE,
)
from moezoo.layers.moe.override import OverriddenRouting, RoutingOverride, routing_overrides
from moezoo.layers.moe.permute import combine, permute
from moezoo.layers.moe.recording import RoutingRecorder
from moezoo.layers.moe.routing import (
    biased_topk,
    grouped_topk,
    softmax_topk,
    sparsemixer,
    topk_sigmoid,
)

__all__ = [
    "ACTIVATIONS",
    "Arrival",
    "BiasedLogits",
    "BiasedRoute",
    "Dispatcher",
    "Flight",
    "FusedMoE",
    "Gating",
    "OverriddenRouting",
    "RoutingOverride",
    "RoutingRecorder",
    "biased_topk",
    "combine",
    "fused_experts",
    "grouped_topk",
    "permute",
    "routing_overrides",
    "softmax_topk",
    "sparsemixer",
    "topk_sigmoid",
    "workspace_bytes",
]

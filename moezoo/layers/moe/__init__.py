"""The MoE layer as four verbs: route, permute, experts, combine."""

from moezoo.layers.kernels.activations import ACTIVATIONS, Gating
from moezoo.layers.moe.experts import fused_experts, workspace_bytes
from moezoo.layers.moe.layer import Arrival, BiasedRoute, Dispatcher, Flight, FusedMoE
from moezoo.layers.moe.permute import combine, permute
from moezoo.layers.moe.recording import RoutingRecorder
from moezoo.layers.moe.routing import grouped_topk, softmax_topk

__all__ = [
    "ACTIVATIONS",
    "Arrival",
    "BiasedRoute",
    "Dispatcher",
    "Flight",
    "FusedMoE",
    "Gating",
    "RoutingRecorder",
    "combine",
    "fused_experts",
    "grouped_topk",
    "permute",
    "softmax_topk",
    "workspace_bytes",
]

"""Expert-parallel load balancing: which experts are copied, where they go, and what that moves."""

from moezoo.parallel.eplb.movement import (
    LayerMoves,
    Move,
    experts_received,
    keep_slots,
    plan_moves,
)
from moezoo.parallel.eplb.policy import least_movement, rebalance_experts

__all__ = [
    "LayerMoves",
    "Move",
    "experts_received",
    "keep_slots",
    "least_movement",
    "plan_moves",
    "rebalance_experts",
]

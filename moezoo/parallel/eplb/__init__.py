"""Expert-parallel load balancing: which experts are replicated, where they go, and what moves."""

from moezoo.parallel.eplb.movement import (
    LayerMoves,
    Move,
    experts_received,
    keep_slots,
    plan_moves,
)
from moezoo.parallel.eplb.policy import least_movement, rebalance_experts
from moezoo.parallel.eplb.state import (
    POLICIES,
    EPLBState,
    ImbalanceWatch,
    balancedness,
    rebalanced,
)

__all__ = [
    "POLICIES",
    "EPLBState",
    "ImbalanceWatch",
    "LayerMoves",
    "Move",
    "balancedness",
    "experts_received",
    "keep_slots",
    "least_movement",
    "plan_moves",
    "rebalance_experts",
    "rebalanced",
]

"""The state of expert-parallel load balancing while a model runs: maps and loads, on its device.

Nothing here waits for the device unless its docstring says so, and nothing communicates. The caller
sums loads over ranks between `logical_load` and `rebalanced`, and moves the weights of `plan_moves`
between `rebalanced` and `switch_layers_`.

Legend: T tokens, K experts per token, L MoE layers, E experts (logical), P physical experts in
slots, R ranks (P / R slots each), X the most replicas of an expert, W steps of the window.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo.device import to_device
from moezoo.errors import ExpertMapError, LoadImbalanceWarning
from moezoo.parallel.eplb.movement import keep_slots
from moezoo.parallel.eplb.policy import least_movement, rebalance_experts
from moezoo.parallel.placement import check_map

POLICIES = ("default", "least_movement")
"""Names of policies; `default` is the published algorithm."""

GOLDEN = 2654435769
"""2^32 over the golden ratio: multiples of it fill a range evenly (Fibonacci hashing)."""


def rebalanced(
    load: Tensor,
    physical_to_logical_map: Tensor,
    *,
    num_ranks: int,
    policy: str = "default",
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Tensor:
    """Return the next map int64 [L, P], on the CPU, for loads [L, E]; waits for the device.

    An expert that stays on its rank stays in its slot. Groups and nodes are those of
    `rebalance_experts`.

    Raises ValueError for an unknown policy, and for several nodes with `least_movement`, which does
    not know nodes.
    """
    if policy == "least_movement" and num_nodes > 1:
        raise ValueError(
            f"policy 'least_movement' knows no nodes, got num_nodes={num_nodes}; use 'default'"
        )
    old = physical_to_logical_map.cpu()
    if policy == "least_movement":
        new = least_movement(load, old, num_ranks)
    elif policy == "default":
        new, _, _ = rebalance_experts(load, old.shape[1], num_groups, num_nodes, num_ranks)
    else:
        raise ValueError(f"policy is {policy!r}, expected {' or '.join(map(repr, POLICIES))}")
    return keep_slots(old, new, num_ranks)


def balancedness(rank_load: Tensor) -> Tensor:
    """Return the mean load of a rank over the highest, fp64 [..], for rank_load [.., L, R].

    1 is best. Both are summed over layers first, as each layer waits for its busiest rank. 1
    without any load.
    """
    rank_load = rank_load.double()
    highest = rank_load.amax(-1).sum(-1)
    return torch.where(highest > 0, rank_load.mean(-1).sum(-1) / highest, 1.0)


def replica_maps(physical_to_logical_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the slots of each expert in ascending order, int64 [L, E, X] padded with -1, and their
    number, int64 [L, E], for a map int64 [L, P]. X is P - E + 1, the most replicas that an expert
    can have in any map.
    """
    num_layers, num_physical = physical_to_logical_map.shape
    most = num_physical - num_experts + 1
    # Stable: slots of an expert stay in order, so a slot's place among them is its distance to
    # the first of them.
    experts, slots = physical_to_logical_map.sort(dim=1, stable=True)
    counts = torch.zeros_like(experts[:, :1]).expand(-1, num_experts).clone()
    counts.scatter_add_(1, experts, torch.ones_like(experts))
    first = (counts.cumsum(1) - counts).gather(1, experts)
    place = torch.arange(num_physical, device=experts.device) - first
    replicas = torch.full((num_layers, num_experts * most), -1, device=experts.device)
    replicas.scatter_(1, experts * most + place, slots)
    return replicas.view(num_layers, num_experts, most), counts


def choose_replicas(
    topk_ids: Tensor, replicas: Tensor, counts: Tensor, first_token: Tensor
) -> Tensor:
    """Choose a replica of each expert in topk_ids int [T, K]: slots int32 [T, K]; -1 stays -1.

    replicas int64 [E, X] and counts int64 [E] are one layer of `replica_maps`. A multiplicative
    hash of the token's place in the batch plus first_token, int64 [1], decides. It spreads
    consecutive tokens evenly, and also every n-th token.
    """
    tokens = torch.arange(len(topk_ids), device=topk_ids.device) + first_token
    spread = tokens * GOLDEN % 2**32
    experts = topk_ids.clamp(min=0).long()
    # The upper bits decide, as lower ones repeat with each power of two.
    replica = spread[:, None] * counts[experts] >> 32
    return torch.where(topk_ids < 0, -1, replicas[experts, replica]).int()


class EPLBState:
    """The maps and loads of a model's MoE layers.

    The tensors never move, so that captured graphs see what changes in them.

    Args:
        physical_to_logical_map: the initial map, int64 [L, P].
        num_experts: E.
        bounds: [R + 1]; rank r has slots bounds[r] to bounds[r + 1], by default P / R each.
        window_size: W, the number of past steps that a rebalance looks at.
        step_interval: steps between rebalances; the first is due after a quarter of it.
        seed: a different number on each rank, so that ranks do not all choose the same replica at
            the same time.
    """

    def __init__(
        self,
        physical_to_logical_map: Tensor,
        num_experts: int,
        *,
        num_ranks: int,
        bounds: Sequence[int] | None = None,
        window_size: int = 1000,
        step_interval: int = 3000,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if window_size < 1 or step_interval < 1:
            raise ValueError(
                f"window_size and step_interval must be at least 1, got {window_size} and "
                f"{step_interval}"
            )
        check_map(physical_to_logical_map, num_experts, "the map")
        num_layers, num_physical = physical_to_logical_map.shape
        if bounds is None:
            if num_physical % num_ranks:
                raise ExpertMapError(f"{num_physical} slots do not divide over {num_ranks} ranks")
            bounds = range(0, num_physical + 1, num_physical // num_ranks)
        self.num_experts = num_experts
        self.num_ranks = num_ranks
        self.step_interval = step_interval
        self.physical_to_logical_map = physical_to_logical_map.to(device, torch.int64).clone()
        self.logical_to_physical_map, self.logical_replica_count = replica_maps(
            self.physical_to_logical_map, num_experts
        )
        # One place more, for tokens that do not count.
        self._pass = torch.zeros(num_layers, num_physical + 1, dtype=torch.int32, device=device)
        self.expert_load_pass = self._pass[:, :-1]
        """Number of tokens of each physical expert in this step so far, int32 [L, P]."""
        self.expert_load_window = torch.zeros(
            window_size, num_layers, num_physical, dtype=torch.int32, device=device
        )
        """Loads of the last W steps, int32 [W, L, P], in a ring."""
        sizes = torch.tensor(bounds).diff()
        self._rank_of_slot = torch.arange(num_ranks).repeat_interleave(sizes).to(device)
        self._next_in_window = 0
        self._steps = 0
        self._last_rebalance = -(step_interval - max(1, step_interval // 4))
        self._first_token = torch.full((1,), seed * GOLDEN % 2**31, device=device)

    def physical_ids(self, layer: int, topk_ids: Tensor) -> Tensor:
        """Choose a replica of each expert in topk_ids int [T, K]: slots int32 [T, K].

        As `choose_replicas` does, and differently in each step.
        """
        return choose_replicas(
            topk_ids,
            self.logical_to_physical_map[layer],
            self.logical_replica_count[layer],
            self._first_token,
        )

    def record_(self, layer: int, physical_ids: Tensor, real: Tensor | None = None) -> None:
        """Count the tokens of physical_ids int [T, K], without ids of -1 and without padding.

        real is bool [T], False at padding.
        """
        num_physical = self.expert_load_pass.shape[1]
        ids = torch.where(physical_ids < 0, num_physical, physical_ids)
        if real is not None:
            ids = torch.where(real[:, None], ids, num_physical)
        ids = ids.flatten().long()
        self._pass[layer].scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def choose_(self, layer: int, topk_ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Do `physical_ids` and `record_`; on a GPU in one launch."""
        if not topk_ids.is_cuda:
            slots = self.physical_ids(layer, topk_ids)
            self.record_(layer, slots, real)
            return slots
        from moezoo.parallel.eplb.replicas import choose_and_count_

        return choose_and_count_(
            topk_ids,
            self.logical_to_physical_map[layer],
            self.logical_replica_count[layer],
            first_token=self._first_token,
            load=self._pass[layer],
            real=real,
            golden=GOLDEN,
        )

    def end_step_(self, *, dummy: bool = False) -> None:
        """Move the step's loads into the window; a dummy step counts as a step, without loads."""
        if not dummy:
            self.expert_load_window[self._next_in_window].copy_(self.expert_load_pass)
            self._next_in_window = (self._next_in_window + 1) % len(self.expert_load_window)
        self._pass.zero_()
        self._first_token += 1
        self._steps += 1

    @property
    def is_due(self) -> bool:
        """Whether a rebalance is due; it is at the same step on every rank."""
        return self._steps - self._last_rebalance >= self.step_interval

    def rebalance_begins_(self) -> None:
        """Make the next rebalance due an interval from this step."""
        self._last_rebalance = self._steps

    def logical_load(self) -> Tensor:
        """Return the number of tokens of each expert in the window, int64 [L, E]."""
        load = self.expert_load_window.sum(0)
        logical = torch.zeros_like(self.logical_replica_count)
        return logical.scatter_add_(1, self.physical_to_logical_map, load)

    def rank_load(self) -> Tensor:
        """Return the number of tokens of each rank in the window, int64 [L, R]."""
        load = self.expert_load_window.sum(0)
        of_ranks = load.new_zeros(len(load), self.num_ranks)
        return of_ranks.scatter_add_(1, self._rank_of_slot.expand_as(load), load)

    def switch_layers_(self, layers: Sequence[int], slots: Tensor) -> None:
        """Set the maps of n layers to slots int64 [n, P], on the CPU.

        Call this between the same two steps as the weights are switched. The loads in the window
        are converted to the new slots: each expert's tokens are spread evenly over its replicas.

        Raises ExpertMapError, with nothing changed, for another size or an expert without a slot.
        """
        num_physical = self.physical_to_logical_map.shape[1]
        if slots.shape != (len(layers), num_physical):
            raise ExpertMapError(
                f"layers {list(layers)} have {num_physical} slots, and the new maps are "
                f"{list(slots.shape)}"
            )
        check_map(slots, self.num_experts, "the new map")
        packed = torch.cat((slots, torch.tensor(layers)[:, None]), 1)
        packed = to_device(packed, self.physical_to_logical_map.device)
        slots, at = packed[:, :-1], packed[:, -1]
        replicas, counts = replica_maps(slots, self.num_experts)
        window = self.expert_load_window[:, at]
        old = self.physical_to_logical_map[at].expand_as(window)
        load = window.new_zeros(*window.shape[:2], self.num_experts).scatter_add_(2, old, window)
        own = torch.arange(num_physical, device=slots.device)[:, None]
        of_slot = replicas.gather(1, slots[..., None].expand(-1, -1, replicas.shape[2]))
        place = (of_slot == own).int().argmax(-1)
        number = counts.gather(1, slots)
        # The first replicas take what does not divide.
        even = (load.gather(2, slots.expand_as(window)) + number - 1 - place) // number
        self.expert_load_window[:, at] = even.to(window.dtype)
        self.physical_to_logical_map[at] = slots
        self.logical_to_physical_map[at] = replicas
        self.logical_replica_count[at] = counts


class ImbalanceWatch:
    """Warns with `LoadImbalanceWarning`, once, when balancedness stays low."""

    def __init__(self, *, threshold: float = 0.6, patience: int = 3) -> None:
        self.threshold = threshold
        self.patience = patience
        self._low = 0

    def __call__(self, balancedness: float) -> None:
        """Take the balancedness of an interval; warn at the `patience`-th low one in a row."""
        self._low = self._low + 1 if balancedness < self.threshold else 0
        if self._low == self.patience:
            warnings.warn(
                LoadImbalanceWarning(
                    f"the mean load of a rank is {balancedness:.2f} of the highest, and was below "
                    f"{self.threshold} for {self.patience} intervals: MoE layers take about "
                    f"{1 / max(balancedness, 1e-9):.1f} times as long as balanced ones; try "
                    'eplb={"num_redundant_experts": ..}, or a placement of moezoo eplb plan'
                ),
                stacklevel=2,
            )

"""Policies: how often to replicate each expert and where to put it, so that GPUs are evenly loaded.

`rebalance_experts` is the algorithm that DeepSeek published as EPLB in 2025; `least_movement` goes
from the present map to about the same balance with few moves. Both work on all layers at
once.

Legend: L MoE layers, E experts (logical), P physical experts in slots, G GPUs (P / G slots each),
X the most replicas of an expert. GPU g has P / G slots from g * P / G on.
"""

import torch
from torch import Tensor

BALANCED = 0.97
"""`least_movement` stops swapping in a layer whose mean GPU load is this much of its highest."""


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replicate and place experts by their load.

    If the groups divide over the nodes, a group's experts and their replicas stay on one node
    (hierarchical); otherwise nodes and groups are ignored (global). Ties go to the first.

    Args:
        weight: load of each expert [L, E], any dtype; computed in fp32 on the CPU.
        num_replicas: P, at least E, a multiple of num_gpus.
        num_groups: number of groups of neighbouring experts, E / num_groups each.
        num_gpus: a multiple of num_nodes.

    Returns:
        physical_to_logical_map int64 [L, P], the expert of each slot;
        logical_to_physical_map int64 [L, E, X], the slots of each expert, padded with -1;
        logical_replica_count int64 [L, E].

    Raises ValueError for loads that are negative or not finite, and numbers that do not divide.
    """
    weight = checked_load(weight)
    num_layers, num_experts = weight.shape
    _check(num_experts, num_replicas, num_groups=num_groups, num_nodes=num_nodes, num_gpus=num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    slots, ranks, counts = _hierarchical(weight, num_replicas, num_groups, num_nodes, num_gpus)
    most = int(counts.max())
    replicas = torch.full((num_layers, num_experts * most), -1, dtype=torch.int64)
    replicas.scatter_(1, slots * most + ranks, torch.arange(num_replicas).expand(num_layers, -1))
    return slots, replicas.view(num_layers, num_experts, most), counts


def least_movement(
    weight: Tensor, physical_to_logical_map: Tensor, num_gpus: int, *, balanced: float = BALANCED
) -> Tensor:
    """Return a new map, int64 [L, P], that differs little from the old one [L, P].

    Numbers of replicas are those of the published algorithm; a slot gets another expert only where
    one expert has too many slots and another too few. Then, in each layer, the busiest GPU swaps an
    expert with another GPU, by the best of all swaps each time, until the layer is balanced or no
    swap helps. A layer without load stays as it is. Nodes are ignored.

    Raises ValueError for loads that are negative or not finite, and a map that does not fit them.
    """
    weight = checked_load(weight)
    slots = physical_to_logical_map.cpu().clone()
    if len(slots) != len(weight) or slots.shape[1] % num_gpus:
        raise ValueError(
            f"the map must be [{len(weight)}, P], P a multiple of {num_gpus} GPUs, got "
            f"{list(slots.shape)}"
        )
    loaded = weight.sum(1) > 0
    weight, changing = weight[loaded], slots[loaded]
    _, _, counts = replicate_experts(weight, slots.shape[1])
    load = weight / counts
    _hand_over(changing, load, counts, num_gpus)
    _swap(changing, load, num_gpus, balanced)
    slots[loaded] = changing
    return slots


def checked_load(weight: Tensor) -> Tensor:
    """Return loads as fp32 [L, E] on the CPU; raises ValueError for anything that is no load."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [L, E], neither of them 0, got {list(weight.shape)}")
    weight = weight.float().cpu()
    if not (weight.isfinite().all() and (weight >= 0).all()):
        raise ValueError("weight must be finite and not negative: it is the load of each expert")
    return weight


def _check(
    num_experts: int, num_replicas: int, *, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    numbers = {"num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if num_replicas < num_experts:
        raise ValueError(f"{num_replicas} replicas are fewer than the {num_experts} experts")
    for whole, part, what in (
        (num_experts, num_groups, "experts do not divide into num_groups"),
        (num_replicas, num_gpus, "replicas do not divide over num_gpus"),
        (num_gpus, num_nodes, "GPUs do not divide over num_nodes"),
    ):
        if whole % part:
            raise ValueError(f"{whole} {what}={part}")


def balanced_packing(weight: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Put n items of weight fp32 [X, n] into packs of n / num_packs items each.

    Returns the pack of each item and its place in the pack, int64 [X, n]. The heaviest items go
    first, each into the lightest pack that has room. With as many packs as items, item i is in
    pack i.
    """
    num_rows, num_items = weight.shape
    if num_items == num_packs:
        return torch.arange(num_packs).expand(num_rows, -1), torch.zeros_like(weight).long()
    room = num_items // num_packs
    order = weight.sort(dim=1, descending=True, stable=True)
    rows = torch.arange(num_rows)
    loads = torch.zeros(num_rows, num_packs)
    full = torch.zeros(num_rows, num_packs)
    taken = torch.zeros(num_rows, num_packs, dtype=torch.int64)
    packs, places = (torch.empty(num_items, num_rows, dtype=torch.int64) for _ in range(2))
    for i, heaviest in enumerate(order.values.T):
        pack = (loads + full).argmin(1)
        packs[i] = pack
        places[i] = place = taken[rows, pack]
        loads[rows, pack] += heaviest
        taken[rows, pack] += 1
        full[rows[place == room - 1], pack[place == room - 1]] = torch.inf
    return _unsorted(packs.T, order.indices), _unsorted(places.T, order.indices)


def _unsorted(values: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(values).scatter_(1, order, values)


def replicate_experts(weight: Tensor, num_replicas: int) -> tuple[Tensor, Tensor, Tensor]:
    """Replicate the experts whose replicas are busiest, by weight fp32 [X, E].

    Returns the expert of each of the P replicas and its number among that expert's replicas, both
    int64 [X, P], and the number of replicas of each expert, int64 [X, E].
    """
    num_rows, num_experts = weight.shape
    experts = torch.arange(num_replicas).repeat(num_rows, 1)
    ranks = torch.zeros(num_rows, num_replicas, dtype=torch.int64)
    counts = torch.ones(num_rows, num_experts, dtype=torch.int64)
    rows = torch.arange(num_rows)
    for i in range(num_experts, num_replicas):
        busiest = (weight / counts).argmax(1)
        experts[:, i] = busiest
        ranks[:, i] = counts[rows, busiest]
        counts[rows, busiest] += 1
    return experts, ranks, counts


def _hierarchical(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Distribute groups over nodes, replicate within nodes, and pack replicas onto a node's GPUs.

    Returns the expert of each slot and its number among that expert's replicas, both [L, P], and
    the number of replicas of each expert [L, E]. Experts are renumbered so that those of a node are
    neighbours; "local" numbers count within a node.
    """
    num_layers, num_experts = weight.shape
    group_size = num_experts // num_groups
    per_node = num_replicas // num_nodes

    group_load = weight.unflatten(1, (num_groups, group_size)).sum(-1)
    node, place = balanced_packing(group_load, num_nodes)
    first = (node * (num_groups // num_nodes) + place) * group_size
    renumbered = (first[..., None] + torch.arange(group_size)).flatten(1)
    expert = _inverse(renumbered)

    local_load = weight.gather(1, expert).view(num_layers * num_nodes, -1)
    local, ranks, counts = replicate_experts(local_load, per_node)

    replica_load = (local_load / counts).gather(1, local)
    gpu, place = balanced_packing(replica_load, num_gpus // num_nodes)
    replica = _inverse(gpu * (num_replicas // num_gpus) + place)

    first = torch.arange(0, num_experts, num_experts // num_nodes)[:, None]
    in_slots = local.gather(1, replica).view(num_layers, num_nodes, per_node) + first
    return (
        expert.gather(1, in_slots.flatten(1)),
        ranks.gather(1, replica).view(num_layers, -1),
        counts.view(num_layers, -1).gather(1, renumbered),
    )


def _inverse(permutation: Tensor) -> Tensor:
    """Return the inverse of each row's permutation."""
    return _unsorted(torch.arange(permutation.shape[1]).expand(permutation.shape), permutation)


def _gpu_load(slots: Tensor, load: Tensor, num_gpus: int) -> Tensor:
    """Return loads of GPUs [L, G], from the slots' experts [L, P] and loads of a replica [L, E]."""
    return load.gather(1, slots).unflatten(1, (num_gpus, -1)).sum(-1)


def _hand_over(slots: Tensor, load: Tensor, counts: Tensor, num_gpus: int) -> None:
    """Give slots of experts with too many replicas to those with too few, in place.

    Afterwards experts have `counts` replicas. An expert gives up slots on the busiest GPUs that
    hold it. The busiest missing replica goes first, to the free slot of the least busy GPU.
    """
    for layer, row in enumerate(slots):
        have = row.bincount(minlength=counts.shape[1])
        if torch.equal(have, counts[layer]):
            continue
        on_gpu = _gpu_load(row[None], load[layer][None], num_gpus)[0].tolist()
        of_slot = load[layer].tolist()
        size = len(row) // num_gpus
        free: list[int] = []
        for expert in (have > counts[layer]).nonzero()[:, 0].tolist():
            held = (row == expert).nonzero()[:, 0].tolist()
            for _ in range(int(have[expert] - counts[layer, expert])):
                slot = max(held, key=lambda slot: on_gpu[slot // size])
                held.remove(slot)
                on_gpu[slot // size] -= of_slot[expert]
                free.append(slot)
        missing = torch.arange(len(have)).repeat_interleave((counts[layer] - have).clamp(min=0))
        for expert in sorted(missing.tolist(), key=lambda expert: -of_slot[expert]):
            slot = min(free, key=lambda slot: on_gpu[slot // size])
            free.remove(slot)
            row[slot] = expert
            on_gpu[slot // size] += of_slot[expert]


def _swap(slots: Tensor, load: Tensor, num_gpus: int, balanced: float) -> None:
    """Swap experts of each layer's busiest GPU with those of other GPUs, in place."""
    num_slots = slots.shape[1]
    size = num_slots // num_gpus
    mean = load.gather(1, slots).sum(1) / num_gpus
    active = torch.arange(len(slots))
    for _ in range(num_slots):  # each swap lowers a highest load; this many are enough by far
        row, of_slot = slots[active], load[active].gather(1, slots[active])
        on_gpu = of_slot.view(-1, num_gpus, size).sum(-1)
        highest, busiest = on_gpu.max(1)
        unbalanced = mean[active] < balanced * highest
        active, row, of_slot, on_gpu = (x[unbalanced] for x in (active, row, of_slot, on_gpu))
        highest, busiest = highest[unbalanced], busiest[unbalanced]
        if not len(active):
            return
        mine = busiest[:, None] * size + torch.arange(size)
        # [l, size, P]: the load that the busiest GPU sheds if its slot i is swapped with slot j
        shed = of_slot.gather(1, mine)[..., None] - of_slot[:, None]
        others = on_gpu.repeat_interleave(size, 1)[:, None]
        higher = torch.maximum(highest[:, None, None] - shed, others + shed)
        higher.scatter_(2, mine[:, None].expand(-1, size, -1), torch.inf)
        least, best = higher.flatten(1).min(1)
        helps = least < highest * (1 - 1e-6)
        active, row, mine, best = active[helps], row[helps], mine[helps], best[helps]
        a = mine.gather(1, (best // num_slots)[:, None])
        b = (best % num_slots)[:, None]
        slots[active[:, None], a], slots[active[:, None], b] = row.gather(1, b), row.gather(1, a)

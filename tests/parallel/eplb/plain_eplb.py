"""EPLB with loops over numbers, as its publication describes it: the oracle of the fast one.

All arithmetic on loads is in numpy's float32, since sums of float64 may break ties otherwise.
"""

import numpy as np


def pack(weight, packs):
    """Of one row: each item's pack and its place there."""
    room = len(weight) // packs
    if room == 1:
        return list(range(packs)), [0] * packs
    loads, members = [np.float32(0)] * packs, [[] for _ in range(packs)]
    for item in sorted(range(len(weight)), key=lambda item: -weight[item]):
        open_packs = [p for p in range(packs) if len(members[p]) < room]
        lightest = min(open_packs, key=lambda p: loads[p])
        members[lightest].append(item)
        loads[lightest] += weight[item]
    where = {item: (p, members[p].index(item)) for p in range(packs) for item in members[p]}
    return [where[i][0] for i in range(len(weight))], [where[i][1] for i in range(len(weight))]


def replicate(weight, replicas):
    """Of one row: the expert of each replica, and which of its replicas that is."""
    experts, ranks, counts = list(range(len(weight))), [0] * len(weight), [1] * len(weight)
    while len(experts) < replicas:
        each = [w / np.float32(c) for w, c in zip(weight, counts, strict=True)]
        busiest = each.index(max(each))
        experts.append(busiest)
        ranks.append(counts[busiest])
        counts[busiest] += 1
    return experts, ranks, counts


def rebalance(weight, replicas, groups, nodes, gpus):
    """The maps of one layer as nested lists: expert of each slot, slots of each expert."""
    weight = [np.float32(w) for w in weight]
    if groups % nodes:
        groups = nodes = 1
    size = len(weight) // groups
    group_load = np.array(weight, dtype=np.float32).reshape(groups, size).sum(1)
    node_of, place_of = pack(list(group_load), nodes)
    slots = []
    slots_of = [{} for _ in weight]
    for node in range(nodes):
        mine = sorted((g for g in range(groups) if node_of[g] == node), key=place_of.__getitem__)
        experts = [g * size + i for g in mine for i in range(size)]
        of_replica, rank, counts = replicate([weight[e] for e in experts], replicas // nodes)
        load = [weight[experts[e]] / np.float32(counts[e]) for e in of_replica]
        gpu, place = pack(load, gpus // nodes)
        order = sorted(range(len(load)), key=lambda r: (gpu[r], place[r]))
        for r in order:
            slots_of[experts[of_replica[r]]][rank[r]] = len(slots)
            slots.append(experts[of_replica[r]])
    return slots, [[found[i] for i in range(len(found))] for found in slots_of]

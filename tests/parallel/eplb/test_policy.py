import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_eplb import rebalance

from moezoo.parallel.eplb import experts_received, least_movement, rebalance_experts

PUBLISHED_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def zipf(num_layers, num_experts, seed=0):
    rng = np.random.default_rng(seed)
    popular = 1 / (1 + np.arange(num_experts))
    return torch.tensor(np.stack([rng.permutation(popular) for _ in range(num_layers)]))


def balancedness(slots, weight, num_gpus):
    counts = torch.stack([row.bincount(minlength=weight.shape[1]) for row in slots])
    load = (weight / counts).gather(1, slots).unflatten(1, (num_gpus, -1)).sum(-1)
    return float(load.mean(1).sum() / load.amax(1).sum())


def test_the_published_example():
    slots, replicas, counts = rebalance_experts(torch.tensor(PUBLISHED_LOADS), 16, 4, 2, 8)
    assert slots.tolist() == PUBLISHED_MAP
    assert replicas.dtype == counts.dtype == slots.dtype == torch.int64
    assert (counts.sum(1) == 16).all()
    assert replicas.shape == (2, 12, 2)
    assert replicas[0, 5].tolist() == [0, 2]
    assert replicas[0, 6].tolist() == [1, -1]


@given(data=st.data())
def test_as_the_plain_implementation(data):
    nodes, per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 6))
    experts = groups * data.draw(st.integers(1, 4))
    gpus = nodes * per_node
    each = -(-experts // gpus) + data.draw(st.integers(0, 2))
    # few values, so that there are ties, and zeros
    loads = data.draw(st.lists(st.integers(0, 4), min_size=2 * experts, max_size=2 * experts))
    weight = torch.tensor(loads).view(2, experts)
    if groups % nodes == 0 and each * per_node < experts // nodes:
        return
    slots, replicas, counts = rebalance_experts(weight, gpus * each, groups, nodes, gpus)
    for layer in range(2):
        expected, expected_replicas = rebalance(
            weight[layer].tolist(), gpus * each, groups, nodes, gpus
        )
        assert slots[layer].tolist() == expected
        found = [[slot for slot in row if slot >= 0] for row in replicas[layer].tolist()]
        assert found == expected_replicas
        assert counts[layer].tolist() == [len(row) for row in expected_replicas]


@pytest.mark.parametrize(
    ("groups", "nodes", "gpus", "redundant"), [(8, 4, 32, 32), (8, 5, 40, 24), (1, 1, 36, 32)]
)
def test_as_the_plain_implementation_at_the_size_of_a_large_model(groups, nodes, gpus, redundant):
    weight = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)).exp().pow(4)
    slots, _, _ = rebalance_experts(weight, 256 + redundant, groups, nodes, gpus)
    for layer in range(2):
        # numpy would convert float64 otherwise than torch did
        loads = weight[layer].numpy().tolist()
        assert slots[layer].tolist() == rebalance(loads, 256 + redundant, groups, nodes, gpus)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight must be \[L, E\]"),
        ({"weight": torch.full((1, 4), -1)}, "finite and not negative"),
        ({"weight": torch.full((1, 4), float("nan"))}, "finite and not negative"),
        ({"num_replicas": 3}, "3 replicas are fewer than the 4 experts"),
        ({"num_replicas": 5}, "5 replicas do not divide over num_gpus=2"),
        ({"num_groups": 3}, "4 experts do not divide into num_groups=3"),
        ({"num_nodes": 3}, "2 GPUs do not divide over num_nodes=3"),
        ({"num_gpus": 0}, "num_gpus must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit(changes, message):
    arguments = {
        "weight": torch.ones(1, 4),
        "num_replicas": 6,
        "num_groups": 2,
        "num_nodes": 2,
        "num_gpus": 2,
    }
    with pytest.raises(ValueError, match=message):
        rebalance_experts(**(arguments | changes))


@pytest.mark.parametrize("policy", ["published", "least_movement"])
def test_a_second_is_enough_for_320_gpus(policy):
    """On one core, as tests run; seconds of the process, since others may use the core too."""
    weight = zipf(61, 256)
    old = torch.arange(320).remainder(256).expand(61, -1)
    started = time.process_time()
    if policy == "published":
        rebalance_experts(weight, 320, 8, 40, 320)
    else:
        least_movement(weight, old, 320)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(("gpus", "redundant"), [(4, 4), (8, 32), (32, 32), (64, 64)])
def test_least_movement_balances_as_well_with_fewer_experts_moved(gpus, redundant):
    before, after = zipf(3, 256), zipf(3, 256)
    after[:, :128], after[:, 128:] = before[:, 128:], before[:, :128]
    blend = 0.7 * before + 0.3 * after
    old, _, _ = rebalance_experts(before, 256 + redundant, 1, 1, gpus)
    published, _, _ = rebalance_experts(blend, 256 + redundant, 1, 1, gpus)
    new = least_movement(blend, old, gpus)
    assert balancedness(new, blend, gpus) > min(0.97, balancedness(published, blend, gpus)) - 1e-6
    moved = experts_received(old, new, gpus).sum()
    assert moved < 0.5 * experts_received(old, published, gpus).sum()


def test_least_movement_leaves_a_balanced_layer_alone():
    weight = zipf(2, 32)
    old, _, _ = rebalance_experts(weight, 40, 1, 1, 4)
    assert balancedness(old, weight, 4) > 0.97
    assert torch.equal(least_movement(weight, old, 4), old)
    assert torch.equal(least_movement(torch.zeros(2, 32), old, 4), old)


@given(data=st.data())
def test_least_movement_has_a_slot_for_every_expert_and_no_worse_a_balance(data):
    experts, gpus = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    slots = gpus * (-(-experts // gpus) + data.draw(st.integers(0, 2)))
    loads = data.draw(st.lists(st.integers(0, 5), min_size=experts, max_size=experts))
    weight = torch.tensor(loads)[None]
    more = data.draw(
        st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts)
    )
    old = torch.tensor(data.draw(st.permutations([*range(experts), *more])))[None]
    new = least_movement(weight, old, gpus)
    counts = new[0].bincount(minlength=experts)
    assert (counts >= 1).all()
    replica = weight[0] / counts
    least = weight[0] / old[0].bincount(minlength=experts)
    assert replica.max() <= least.max()


def test_least_movement_takes_a_map_of_its_own_layers():
    with pytest.raises(ValueError, match=r"must be \[2, P\], P a multiple of 3 GPUs, got \[1, 6\]"):
        least_movement(torch.ones(2, 4), torch.zeros(1, 6, dtype=torch.int64), 3)

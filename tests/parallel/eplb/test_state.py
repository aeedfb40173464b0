import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import ExpertMapError, LoadImbalanceWarning
from moezoo.parallel.eplb import (
    EPLBState,
    ImbalanceWatch,
    balancedness,
    rebalance_experts,
    rebalanced,
)
from moezoo.parallel.placement import initial_map


def state(slots, num_experts, num_ranks=2, **options):
    return EPLBState(torch.tensor(slots), num_experts, num_ranks=num_ranks, **options)


def test_the_maps_agree_with_each_other():
    weight = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    slots, replicas, counts = rebalance_experts(weight, 20, 1, 1, 4)
    eplb = EPLBState(slots, 12, num_ranks=4)
    assert torch.equal(eplb.logical_replica_count, counts)
    assert eplb.logical_to_physical_map.shape == (3, 12, 9)
    expected = replicas.masked_fill(replicas < 0, 99).sort(-1).values
    found = eplb.logical_to_physical_map[..., : replicas.shape[2]]
    assert torch.equal(found.masked_fill(found < 0, 99), expected)


@pytest.mark.parametrize("replicas", range(2, 9))
@pytest.mark.parametrize("k", range(2, 9))
def test_replicas_are_chosen_evenly(k, replicas):
    """Also by every n-th token, as many as there are replicas: positions would all meet one."""
    slots = torch.arange(2 * k).repeat(replicas)
    eplb = EPLBState(slots[None], 2 * k, num_ranks=1, seed=3)
    # even tokens choose the first k experts, odd ones the others
    topk_ids = torch.arange(k)[None] + k * (torch.arange(8192) % 2)[:, None]
    for every in (1, 2, replicas):
        chosen = eplb.physical_ids(0, topk_ids[::every])
        assert torch.equal(slots[chosen.long()], topk_ids[::every])
        load = chosen.flatten().long().bincount(minlength=len(slots)).view(replicas, -1).double()
        load = load[:, load.sum(0) > 0]
        assert (load.amax(0) / load.mean(0)).max() < 1.15


def test_a_few_tokens_a_step_are_spread_over_the_steps():
    eplb = state([[0, 0, 0, 0, 1, 1, 1, 1]], 2)
    load = torch.zeros(8)
    for _ in range(512):
        chosen = eplb.physical_ids(0, torch.tensor([[0, 1]]))
        load[chosen[0].long()] += 1
        eplb.end_step_()
    assert load.max() / load.mean() < 1.15


def test_ids_of_no_expert_and_padding_are_not_counted():
    eplb = state([[0, 1, 2, 0], [2, 1, 0, 1]], 3)
    ids = torch.tensor([[1, -1], [2, 0], [0, 1]])
    physical = eplb.physical_ids(1, ids)
    assert physical.dtype == torch.int32
    assert (physical < 0).tolist() == (ids < 0).tolist()
    eplb.record_(1, torch.tensor([[1, -1], [0, 2], [3, 2]]), torch.tensor([True, True, False]))
    eplb.record_(1, torch.tensor([[1, 3]]))
    assert eplb.expert_load_pass.tolist() == [[0, 0, 0, 0], [1, 2, 1, 1]]


def test_the_window_is_a_ring_and_dummy_steps_leave_no_loads():
    eplb = state([[0, 1]], 2, window_size=2, step_interval=8)
    due = []
    for tokens in range(1, 5):
        eplb.record_(0, torch.tensor([[0]] * tokens))
        eplb.end_step_()
        eplb.record_(0, torch.tensor([[1]]))
        eplb.end_step_(dummy=True)
        due.append(eplb.is_due)
    assert eplb.logical_load().tolist() == [[3 + 4, 0]]
    assert eplb.rank_load().tolist() == [[7, 0]]
    assert eplb.expert_load_pass.tolist() == [[0, 0]]
    # a quarter of the interval to begin with, then the whole
    assert due == [True, True, True, True]
    eplb.rebalance_begins_()
    for step in range(1, 9):
        eplb.end_step_(dummy=True)
        assert eplb.is_due == (step == 8)


@given(data=st.data())
def test_a_switch_keeps_each_experts_load_and_the_memory(data):
    experts, redundant = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    more = [data.draw(st.integers(0, experts - 1)) for _ in range(redundant)]
    maps = [data.draw(st.permutations([*range(experts), *more])) for _ in range(2)]
    eplb = state([maps[0]] * 2, experts, 1, window_size=3)
    slots = st.lists(st.integers(0, experts + redundant - 1), min_size=1, max_size=20)
    for _ in range(2):
        eplb.record_(1, torch.tensor(data.draw(slots))[:, None])
        eplb.end_step_()
    held = (eplb.physical_to_logical_map, eplb.logical_to_physical_map, eplb.logical_replica_count)
    pointers = [tensor.data_ptr() for tensor in held]
    before = eplb.logical_load()
    eplb.switch_layers_([1], torch.tensor(maps[1:]))
    assert torch.equal(eplb.logical_load(), before)
    assert eplb.physical_to_logical_map.tolist() == [maps[0], maps[1]]
    assert [tensor.data_ptr() for tensor in held] == pointers
    fresh = state([maps[1]], experts, 1)
    assert torch.equal(eplb.logical_to_physical_map[1], fresh.logical_to_physical_map[0])
    assert torch.equal(eplb.logical_replica_count[1], fresh.logical_replica_count[0])
    for expert in range(experts):
        of_replicas = eplb.expert_load_window[:, 1][:, torch.tensor(maps[1]) == expert]
        assert (of_replicas.amax(1) - of_replicas.amin(1) <= 1).all()


def test_maps_that_do_not_fit():
    eplb = state([[0, 1, 2, 0]], 3)
    for slots, message in (
        ([0, 1, 0, 1], "no slot for expert 2"),
        ([0, 1, 2], r"layers \[0\] have 4 slots, and the new maps are \[1, 3\]"),
    ):
        with pytest.raises(ExpertMapError, match=message):
            eplb.switch_layers_([0], torch.tensor([slots]))
    assert eplb.physical_to_logical_map.tolist() == [[0, 1, 2, 0]]
    with pytest.raises(ExpertMapError, match="do not divide over 3 ranks"):
        state([[0, 1, 2, 0]], 3, 3)
    with pytest.raises(ValueError, match="window_size and step_interval must be at least 1"):
        state([[0, 1, 2, 0]], 3, window_size=0)


def test_balancedness_is_of_ranks():
    """Upstream took the mean over layers for that over ranks, and found this balanced."""
    assert balancedness(torch.tensor([[100, 0, 0, 0], [100, 0, 0, 0]])) == 0.25
    assert balancedness(torch.tensor([[1, 3], [4, 2]])) == (2 + 3) / (3 + 4)
    assert balancedness(torch.zeros(2, 4)) == 1
    assert balancedness(torch.ones(5, 2, 4)).tolist() == [1] * 5


def test_a_rebalance_from_the_loads_that_were_recorded():
    slots = initial_map(8, 4, 4).expand(2, -1)
    eplb = EPLBState(slots, 8, num_ranks=4)
    for _ in range(5):
        for layer in range(2):
            ids = torch.tensor([[0, 1]] * 50 + [[2, 3], [4, 5], [6, 7]] * 4)
            eplb.record_(layer, eplb.physical_ids(layer, ids))
        eplb.end_step_()
    before = balancedness(eplb.rank_load())
    for policy in ("default", "least_movement"):
        new = rebalanced(eplb.logical_load(), slots, num_ranks=4, policy=policy)
        counts = torch.stack([row.bincount(minlength=8) for row in new])
        load = (eplb.logical_load() / counts).gather(1, new).unflatten(1, (4, -1)).sum(-1)
        assert balancedness(load) > before + 0.2
    with pytest.raises(
        ValueError, match="policy is 'best', expected 'default' or 'least_movement'"
    ):
        rebalanced(eplb.logical_load(), slots, num_ranks=4, policy="best")


def test_a_warning_when_it_stays_low(recwarn):
    watch = ImbalanceWatch(threshold=0.5, patience=2)
    for value in (0.4, 0.6, 0.4, 0.9):
        watch(value)
    assert not recwarn
    watch(0.4)
    with pytest.warns(LoadImbalanceWarning, match=r"Load imbalance detected: .* is 0.25 .* 4.0 ti"):
        watch(0.25)
    watch(0.25)
    assert not recwarn


@pytest.mark.gpu
def test_recording_does_not_wait_for_the_device():
    eplb = state([[0, 1, 2, 0]], 3, device="cuda")
    ids = torch.randint(3, (512, 2), device="cuda")
    real = torch.rand(512, device="cuda") < 0.5
    torch.cuda.set_sync_debug_mode("error")
    try:
        eplb.record_(0, eplb.physical_ids(0, ids), real)
        assert eplb.choose_(0, ids, real).shape == ids.shape
        eplb.end_step_()
        eplb.logical_load()
        eplb.rank_load()
        eplb.switch_layers_([0], torch.tensor([[0, 1, 1, 2]]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert eplb.logical_load().sum() == 4 * real.sum()

import pytest
import torch

from moezoo.parallel.eplb.replicas import choose_and_count_
from moezoo.parallel.eplb.state import GOLDEN, EPLBState

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_real", [False, True])
@pytest.mark.parametrize(("t", "k", "e", "p"), [(1, 1, 3, 4), (63, 5, 7, 20), (300, 2, 9, 9)])
def test_slots_and_counts_are_those_of_the_state(t, k, e, p, has_real, device):
    generator = torch.Generator().manual_seed(t)
    more = torch.randint(e, (p - e,), generator=generator)
    slots = torch.cat((torch.arange(e), more))[torch.randperm(p, generator=generator)]
    state, expected = (
        EPLBState(slots.repeat(2, 1), e, num_ranks=1, seed=5, device=device) for _ in range(2)
    )
    ids = torch.randint(-1, e, (t, k), generator=generator).to(device)
    real = torch.rand(t, generator=generator).to(device) < 0.5 if has_real else None
    for choices in (ids, ids.int(), ids.int().mT.contiguous().mT):
        right = expected.physical_ids(1, choices)
        expected.record_(1, right, real)
        chosen = choose_and_count_(
            choices,
            state.logical_to_physical_map[1],
            state.logical_replica_count[1],
            first_token=state._first_token,
            load=state._pass[1],
            real=real,
            golden=GOLDEN,
        )
        assert chosen.dtype == right.dtype
        assert torch.equal(chosen, right)
        assert torch.equal(state.expert_load_pass, expected.expert_load_pass)
        for each in (state, expected):
            each.end_step_()
    assert choose_and_count_(
        ids[:0],
        state.logical_to_physical_map[1],
        state.logical_replica_count[1],
        first_token=state._first_token,
        load=state._pass[1],
        real=None,
        golden=GOLDEN,
    ).shape == (0, k)

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import ExpertMapError
from moezoo.parallel.eplb import Move, experts_received, keep_slots, plan_moves


def carried_out(old, moves):
    """The slots after the moves."""
    slots = list(old)
    for move in [*moves.local, *(move for moves_ in moves.rounds for move in moves_)]:
        assert old[move.source] == move.expert
        for target in move.targets:
            slots[target] = old[move.source]
    return slots


@st.composite
def two_maps(draw):
    ranks, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * size))
    every = list(range(experts))
    more = st.lists(
        st.sampled_from(every), min_size=ranks * size - experts, max_size=ranks * size - experts
    )
    maps = [draw(st.permutations(every + draw(more))) for _ in range(2)]
    return ranks, *map(torch.tensor, maps)


@given(two_maps())
def test_moves_make_the_new_map_of_the_old_one(maps):
    ranks, old, new = maps
    moves = plan_moves(old, new, ranks)
    assert carried_out(old.tolist(), moves) == new.tolist()
    size = len(old) // ranks
    for move in moves.local:
        assert {moves.rank_of(slot) for slot in move.targets} == {moves.rank_of(move.source)}
    sent = Counter()
    for in_round in moves.rounds:
        senders = [move.source // size for move in in_round]
        receivers = [move.targets[0] // size for move in in_round]
        assert len(set(senders)) == len(senders)
        assert len(set(receivers)) == len(receivers)
        for move, sender, receiver in zip(in_round, senders, receivers, strict=True):
            assert sender != receiver
            assert {slot // size for slot in move.targets} == {receiver}
            sent[receiver] += 1
    expected = experts_received(old[None], new[None], ranks)[0].tolist()
    assert [sent[rank] for rank in range(ranks)] == expected


@given(two_maps())
def test_an_expert_that_stays_on_its_rank_keeps_its_slot(maps):
    ranks, old, new = maps
    kept = keep_slots(old[None], new[None], ranks)[0]
    for rank, (before, wanted, after) in enumerate(
        zip(old.view(ranks, -1), new.view(ranks, -1), kept.view(ranks, -1), strict=True)
    ):
        assert sorted(wanted.tolist()) == sorted(after.tolist()), rank
        stays = Counter(before.tolist()) & Counter(wanted.tolist())
        assert int((before == after).sum()) == stays.total()


def test_senders_share_the_receivers_and_a_rank_receives_once():
    old = torch.tensor([0, 1, 0, 2, 3, 4, 5, 6, 7, 8])
    new = torch.tensor([0, 1, 0, 2, 0, 0, 5, 0, 0, 8])
    moves = plan_moves(old, new, 5)
    assert moves.local == ()
    # ranks 0 and 1 hold expert 0; 2 (in both slots), 3 and 4 need it
    assert moves.rounds == (
        (Move(0, 0, (4, 5)), Move(0, 2, (8,))),
        (Move(0, 0, (7,)),),
    )
    swapped = plan_moves(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 2, 3]), 2)
    assert swapped.rounds == ()
    assert swapped.local == (Move(0, 0, (1,)), Move(1, 1, (0,)))


def test_maps_that_do_not_fit():
    with pytest.raises(ExpertMapError, match="expert 2 is in no slot of the old map"):
        plan_moves(torch.tensor([0, 1]), torch.tensor([0, 2]), 2)
    with pytest.raises(ExpertMapError, match=r"over 2 ranks, got \[1, 2\] and \[1, 4\]"):
        plan_moves(torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1]), 2)
    with pytest.raises(ExpertMapError, match="over 3 ranks"):
        keep_slots(torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 3)

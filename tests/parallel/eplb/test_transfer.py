import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.parallel.eplb.movement import plan_moves
from moezoo.parallel.eplb.transfer import Transfer, plan_waves


def maps(data, num_layers, num_experts, redundant):
    rows = []
    for _ in range(num_layers):
        more = [data.draw(st.integers(0, num_experts - 1)) for _ in range(redundant)]
        rows.append(data.draw(st.permutations([*range(num_experts), *more])))
    return torch.tensor(rows)


@given(data=st.data())
def test_waves_are_the_changed_layers_in_order_and_fit_in_staging(data):
    ranks, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    num_experts = data.draw(st.integers(1, ranks * size))
    old, new = (maps(data, 4, num_experts, ranks * size - num_experts) for _ in range(2))
    waves = plan_waves(old, new, ranks)
    changed = [i for i in range(4) if not torch.equal(old[i], new[i])]
    assert [switch.layer for wave in waves for switch in wave] == changed
    arrivals = []
    for wave in waves:
        assert all(torch.equal(switch.slots, new[switch.layer]) for switch in wave)
        came = torch.zeros(ranks, dtype=torch.int64)
        for switch in wave:
            expected = plan_moves(old[switch.layer], new[switch.layer], ranks)
            assert switch.moves == expected
            for move in switch.moves.all():
                came[move.targets[0] // size] += 1
        assert came.max() <= size
        arrivals.append(came)
    # A wave ends only where the next layer would not have fitted.
    for came, wave in zip(arrivals, waves[1:], strict=False):
        first = torch.zeros(ranks, dtype=torch.int64)
        for move in wave[0].moves.all():
            first[move.targets[0] // size] += 1
        assert (came + first).max() > size


@given(data=st.data())
def test_experts_change_places_within_a_process(data):
    """Also where two take each other's."""
    num_experts, redundant = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    old, new = (maps(data, 3, num_experts, redundant) for _ in range(2))
    weights = torch.arange(1, num_experts + 1)
    layers = [
        # Of other sizes in each layer, a number for each, and of odd length.
        [weights[row].float(), weights[row, None].repeat(1, 3 + i).to(torch.uint8)]
        for i, row in enumerate(old)
    ]
    pointers = [tensor.data_ptr() for layer in layers for tensor in layer]
    transfer = Transfer(layers, None)
    for switches in plan_waves(old, new, 1):
        wave = transfer.wave(switches, 1)
        assert not wave.pieces
        transfer.commit_(wave)
    for i, layer in enumerate(layers):
        assert torch.equal(layer[0], weights[new[i]].float())
        assert torch.equal(layer[1], weights[new[i], None].repeat(1, 3 + i).to(torch.uint8))
    assert pointers == [tensor.data_ptr() for layer in layers for tensor in layer]


@given(data=st.data())
def test_pieces_are_all_bytes_of_all_moves_once_and_bounded(data):
    ranks, size = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    num_experts = data.draw(st.integers(1, ranks * size))
    old, new = (maps(data, 3, num_experts, ranks * size - num_experts) for _ in range(2))
    limit = data.draw(st.integers(1, 40))
    # Of 12 and of odd bytes, and of none.
    layers = [
        [torch.zeros(size, 3), torch.zeros(size, 5 + i).char(), torch.zeros(size, 0)]
        for i in range(3)
    ]
    transfer = Transfer(layers, None)
    for wave in plan_waves(old, new, ranks):
        came: dict[tuple, list[int]] = {}
        for piece in transfer.wave(wave, limit).pieces:
            sent, received = [0] * ranks, [0] * ranks
            for part in piece:
                for move in part.moves:
                    key = part.layer, move.source, move.targets, part.tensor
                    came.setdefault(key, []).extend(range(part.start, part.stop))
                    sent[move.source // size] += part.stop - part.start
                    received[move.targets[0] // size] += part.stop - part.start
            assert 0 < max(sent + received) <= limit
        assert came == {
            (switch.layer, move.source, move.targets, n): list(
                range(layers[switch.layer][n][0].nbytes)
            )
            for switch in wave
            for together in switch.moves.rounds
            for move in together
            for n in (0, 1)
        }

import json

import pytest
import torch

from moezoo.errors import ExpertMapError
from moezoo.parallel.placement import Placement, expert_map, experts_of_rank, initial_map

EIGHT_ON_FOUR = {
    "linear": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "round_robin": [[0, 4], [1, 5], [2, 6], [3, 7]],
}


@pytest.mark.parametrize("strategy", EIGHT_ON_FOUR)
def test_eight_experts_on_four_ranks(strategy):
    for rank, held in enumerate(EIGHT_ON_FOUR[strategy]):
        assert experts_of_rank(8, 4, rank, strategy) == held


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize(("experts", "ranks"), [(1, 1), (7, 3), (8, 3), (3, 8), (256, 320), (5, 5)])
def test_every_expert_has_one_rank_and_the_first_ranks_hold_one_more(experts, ranks, strategy):
    holders = torch.zeros(experts, dtype=torch.int64)
    for rank in range(ranks):
        num_local, rows = expert_map(experts, ranks, rank, strategy)
        assert num_local == experts // ranks + (rank < experts % ranks)
        if rows is None:
            assert ranks == 1
            holders += 1
            continue
        assert rows.dtype == torch.int32
        assert rows[rows >= 0].tolist() == list(range(num_local))
        holders += rows >= 0
    assert holders.tolist() == [1] * experts


def test_a_custom_map_orders_the_rows():
    custom = [[5, 0], [], [1, 4, 2, 3]]
    assert expert_map(6, 3, 0, custom)[1].tolist() == [1, -1, -1, -1, -1, 0]
    assert expert_map(6, 3, 1, custom)[0] == 0
    assert expert_map(6, 3, 2, custom)[1].tolist() == [-1, 0, 2, 3, 1, -1]
    assert expert_map(2, 1, 0, [[1, 0]])[1].tolist() == [1, 0]
    assert expert_map(2, 1, 0, [[0, 1]])[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 4, 4, "linear"), "rank 4 is not one of the 4 ranks"),
        ((8, 4, -1, "linear"), "rank -1 is not"),
        ((0, 4, 0, "linear"), "got 0 experts, 4 ranks"),
        ((8, 0, 0, "linear"), "got 8 experts, 0 ranks"),
        ((8, 4, 0, "random"), "placement is 'random', expected 'linear' or 'round_robin'"),
        ((3, 2, 0, [[0, 1, 2]]), "lists experts for 1 ranks, and there are 2"),
        ((3, 2, 0, [[0, 1], [3]]), "expert 3 on rank 1, and there are experts 0 to 2"),
        ((3, 2, 0, [[0, 1], [1, 2]]), "expert 1 on rank 0 and on rank 1; copies"),
        ((4, 2, 0, [[0], [1]]), r"puts experts \[2, 3\] on no rank"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises(ExpertMapError, match=message) as caught:
        expert_map(*arguments)
    assert str(caught.value).startswith("Expert map mismatch: ")


def test_redundant_experts_follow_in_the_first_map():
    assert initial_map(6, 2, 4).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert initial_map(6, 2, 4, "round_robin").tolist() == [0, 4, 1, 5, 2, 0, 3, 1]
    assert initial_map(2, 4, 6).tolist() == [0, 1, 0, 1, 0, 1]
    assert initial_map(3, 1, 2, [[2, 0], [0, 1]]).tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 1, 4), "6 experts and 1 redundant ones do not divide over 4 ranks; 2 redundant"),
        ((6, -2, 4), "got 6 experts, -2 redundant ones, 4 ranks"),
        ((6, 2, 0), "got 6 experts, 2 redundant ones, 0 ranks"),
        ((3, 1, 2, [[0, 1], [0, 1]]), "no slot for expert 2"),
        ((3, 1, 2, [[0, 1, 2], [0]]), r"must list 2 experts, got \[3, 1\]"),
    ],
)
def test_first_maps_that_do_not_fit(arguments, message):
    with pytest.raises(ExpertMapError, match=message):
        initial_map(*arguments)


def placement():
    return Placement(3, 2, (1, 2), torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]]))


def test_a_file_gives_back_what_was_saved(tmp_path):
    saved = placement()
    saved.save(tmp_path / "placement.json")
    assert json.loads((tmp_path / "placement.json").read_text())["version"] == 1
    loaded = Placement.load(tmp_path / "placement.json")
    assert (loaded.num_experts, loaded.num_ranks, loaded.layers) == (3, 2, (1, 2))
    assert torch.equal(loaded.physical_to_logical_map, saved.physical_to_logical_map)
    assert loaded.num_redundant == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, 'no "format": "moezoo-placement"'),
        ({"version": 2}, "version 2, and this moezoo reads 1"),
        ({"num_experts": "3"}, "num_experts must be whole numbers, got"),
        ({"num_experts": 4}, "no slot for expert 3 in MoE layer 0"),
        ({"num_experts": 2}, "expert 2 in a slot, and there are experts 0 to 1"),
        ({"num_ranks": 3}, "4 slots do not divide over 3 ranks"),
        ({"num_ranks": 0}, "over 0 ranks"),
        ({"layers": [1]}, "a row for each of the 1 layers"),
        ({"layers": [2, 1]}, "layers must ascend"),
        ({"layers": None}, "layers must be whole numbers"),
        ({"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0]]}, "physical|length"),
        ({"physical_to_logical_map": [[0, 1, 2, 0.5], [2, 1, 0, 1]]}, "whole numbers"),
        ({"physical_to_logical_map": 3}, "not iterable"),
    ],
)
def test_files_that_are_no_placement(tmp_path, changes, message):
    path = tmp_path / "placement.json"
    placement().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ExpertMapError, match=message) as caught:
        Placement.load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("Expert map mismatch") == 1


def test_files_that_are_no_json_or_lack_a_field(tmp_path):
    path = tmp_path / "placement.json"
    path.write_text("{")
    with pytest.raises(ExpertMapError, match="not JSON"):
        Placement.load(path)
    path.write_text('{"format": "moezoo-placement", "version": 1}')
    with pytest.raises(ExpertMapError, match="has no 'num_experts'"):
        Placement.load(path)
    with pytest.raises(OSError, match="none"):
        Placement.load(tmp_path / "none")


def test_a_placement_of_another_model():
    placement().check_model(3, (1, 2), 2)
    for other, message in (
        ((4, (1, 2), 2), "for experts: 3, and the model runs with 4"),
        ((3, (0, 1, 2), 2), r"for MoE layers: \[1, 2\], and the model runs with \[0, 1, 2\]"),
        ((3, (1, 2), 4), "for ranks: 2, and the model runs with 4; plan it anew"),
    ):
        with pytest.raises(ExpertMapError, match=message):
            placement().check_model(*other)

import pytest
import torch

from moezoo import EPLB
from moezoo.errors import ExpertMapError
from moezoo.parallel.placement import Placement


def test_a_dict_becomes_options():
    given = {"num_redundant_experts": 4, "window_size": 10, "use_async": False}
    assert EPLB.of(given) == EPLB(num_redundant_experts=4, window_size=10, use_async=False)
    assert EPLB.of(None) is None
    options = EPLB()
    assert EPLB.of(options) is options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"redundant": 4}, "eplb has no 'redundant', expected some of enabled, num_redundant_ex"),
        (3, "eplb is 3, expected a dict such as {'num_redundant_experts': 16}, or a moezoo.EPLB"),
        ({"enabled": 1}, "enabled is 1, expected True or False"),
        ({"use_async": "no"}, "use_async is 'no', expected True or False"),
        ({"num_redundant_experts": -1}, "num_redundant_experts is -1, expected a whole number, 0"),
        ({"window_size": 0}, "window_size is 0, expected a whole number, 1 or more"),
        ({"step_interval": 2.5}, "step_interval is 2.5, expected a whole number, 1 or more"),
        ({"step_interval": True}, "step_interval is True, expected a whole number"),
        ({"policy": "best"}, "policy is 'best', expected 'default' or 'least_movement'"),
        (
            {"expert_placement_strategy": "random"},
            "is 'random', expected 'linear' or 'round_robin'",
        ),
        ({"placement": 3}, "placement is 3, expected a file that moezoo eplb plan wrote"),
        ({"placement": "a", "expert_placement_strategy": "linear"}, "to begin with: give one"),
    ],
)
def test_refuses(given, message):
    with pytest.raises(ValueError) as raised:
        EPLB.of(given)
    assert message in str(raised.value)


def test_where_experts_are_to_begin_with(tmp_path):
    """Its own strategy, else that of `Parallel`; redundant experts follow it."""
    options = EPLB(num_redundant_experts=2)
    linear = options.slots(6, [1, 3], 4, "linear")
    assert linear.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    assert linear.bounds == (0, 2, 4, 6, 8)
    robin = options.slots(6, [1, 3], 4, "round_robin").physical_to_logical_map
    assert robin[0].tolist() == [0, 4, 1, 5, 2, 0, 3, 1]
    own = EPLB(num_redundant_experts=2, expert_placement_strategy="round_robin")
    assert torch.equal(own.slots(6, [1, 3], 4, "linear").physical_to_logical_map, robin)
    lists = EPLB(num_redundant_experts=1, expert_placement_strategy=[[2, 0], [1, 2]])
    assert lists.slots(3, [0], 2, "linear").physical_to_logical_map.tolist() == [[2, 0, 1, 2]]

    maps = torch.tensor([[0, 1, 1, 2], [2, 0, 2, 1]])
    file = tmp_path / "placement.json"
    Placement(3, 2, (1, 3), maps).save(file)
    for given in (EPLB(placement=file), EPLB(placement=str(file), num_redundant_experts=1)):
        assert torch.equal(given.slots(3, [1, 3], 2, "linear").physical_to_logical_map, maps)
    assert torch.equal(EPLB().slots(3, [1, 3], 2, file).physical_to_logical_map, maps)
    with pytest.raises(ExpertMapError, match=r"num_redundant_experts=3 is asked for, .* has 1"):
        EPLB(placement=file, num_redundant_experts=3).slots(3, [1, 3], 2, "linear")
    with pytest.raises(ExpertMapError, match="for ranks: 2, and the model runs with 4"):
        EPLB(placement=file).slots(3, [1, 3], 4, "linear")


def test_experts_that_do_not_divide_stay_where_they_are_or_need_copies():
    with pytest.raises(ExpertMapError, match="2 redundant ones would"):
        EPLB().slots(6, [0], 4, "linear")
    assert EPLB(enabled=False).slots(6, [0], 4, "linear").bounds == (0, 2, 4, 5, 6)

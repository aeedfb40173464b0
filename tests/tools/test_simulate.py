from io import StringIO

import pytest
import torch
from rich.console import Console

from moezoo.errors import ExpertMapError
from moezoo.parallel.placement import Placement
from moezoo.tools.balance import compare, plan
from moezoo.tools.routing import RoutingTrace
from moezoo.tools.simulate import Setting, simulate, zipf_loads


def trace(load):
    return RoutingTrace(tuple(range(len(load))), {"expert_load": load})


def test_without_an_interval_the_linear_map_stays():
    loads = torch.tensor([[[4, 2, 1, 1], [1, 1, 1, 1]], [[0, 0, 6, 2], [4, 4, 0, 0]]])
    simulation = simulate(loads, Setting(2, 0, interval=None))
    assert simulation.steps.tolist() == [(4 + 2) / (6 + 2), (4 + 4) / (8 + 8)]
    assert simulation.rebalanced_at == simulation.moved == ()


def test_a_rebalance_sees_the_window_before_it():
    """Experts 0 and 1 first, from step 4 on 2 and 3: what the map of step 8 serves is in it."""
    early, late = torch.tensor([[8.0, 8, 0, 0]]), torch.tensor([[0.0, 0, 8, 8]])
    loads = torch.stack([early] * 4 + [late] * 8)
    for window, balance in ((4, 1.0), (8, None)):
        simulation = simulate(loads, Setting(2, 0, window, interval=32))
        assert simulation.rebalanced_at == (8,)
        assert simulation.first_map.tolist() == [0.5] * 8
        if balance is not None:
            assert simulation.settled.tolist() == [balance] * 4
    assert simulate(loads, Setting(2, 0, 4, interval=4)).rebalanced_at == (1, 5, 9)


@pytest.mark.parametrize("policy", ["default", "least_movement"])
def test_zipf_loads_are_balanced_within_an_interval(policy):
    """Issue 6: at least 0.9, and by `least_movement` less than half of a full reshuffle moved."""
    loads = zipf_loads(500, 2, 256, half_life=1e5)
    simulation = simulate(loads, Setting(32, 32, 30, 100, policy))
    assert simulation.first_map.mean() < 0.25
    assert simulation.settled.mean() > 0.9
    if policy == "least_movement":
        assert max(simulation.moved) < 0.5


def test_zipf_loads():
    loads = zipf_loads(50, 3, 64, exponent=1.0, tokens=100_000)
    assert loads.sum(2).mean() == pytest.approx(100_000, rel=0.01)
    popular = loads.mean(0).sort(descending=True).values
    expected = 1 / (torch.arange(64) + 1)
    expected *= 100_000 / expected.sum()
    torch.testing.assert_close(popular, expected.double().expand(3, -1), rtol=0.1, atol=5)
    assert torch.equal(loads, zipf_loads(50, 3, 64, tokens=100_000))
    drifting = zipf_loads(50, 3, 64, half_life=10)
    order = drifting.argsort(2)
    assert not torch.equal(order[0, :, -3:], order[-1, :, -3:])
    with pytest.raises(ValueError, match="half_life must be positive"):
        zipf_loads(1, 1, 4, half_life=0)


def test_what_cannot_be_simulated():
    loads = torch.ones(3, 2, 4)
    with pytest.raises(ExpertMapError, match="do not divide over 3 ranks"):
        simulate(loads, Setting(3, 0))
    with pytest.raises(ValueError, match="window and interval must be at least 1"):
        simulate(loads, Setting(2, 0, window=0))
    with pytest.raises(ValueError, match=r"loads must be \[S, L, E\]"):
        simulate(loads[0], Setting(2, 0))
    with pytest.raises(ValueError, match="policy is 'best'"):
        simulate(loads, Setting(2, 0, interval=1, policy="best"))


def test_a_comparison_is_a_table_and_a_plot(tmp_path):
    loads = zipf_loads(40, 2, 16)
    comparison = compare(
        loads,
        num_ranks=[4, 3],
        num_redundant=[0, 4],
        windows=[5],
        intervals=[8, 16],
        policies=["least_movement"],
        expert_bytes=10**9,
    )
    assert len(comparison.simulations) == 2 * 3
    assert comparison.skipped[0].startswith("16 experts and 0 redundant ones do not divide over 3")
    console = Console(width=80, file=StringIO())
    console.print(comparison)
    text = console.file.getvalue()
    assert "…" not in text
    assert "never" in text
    assert "an expert has 1,000,000,000 bytes" in " ".join(text.split())
    rows = comparison.to_dict()["simulations"]
    assert [row["rebalances"] for row in rows] == [0, 5, 3] * 2
    assert rows[1]["moved_bytes"][0] == round(rows[1]["moved"][0] * 32 * 10**9)
    assert rows[4]["balancedness"] > rows[3]["balancedness"]
    pytest.importorskip("matplotlib")
    figure = comparison.plot()
    assert [len(ax.lines) for ax in figure.axes] == [3, 3]
    figure.savefig(tmp_path / "balance.png")
    with pytest.raises(ValueError, match="nothing to simulate: 16 experts and 1 redundant"):
        compare(loads, num_ranks=[3], num_redundant=[1], windows=None, intervals=[], policies=[])


def test_a_plan_is_made_for_the_loads_of_the_trace(tmp_path):
    load = zipf_loads(1, 3, 32)[0].long()
    for policy in ("default", "least_movement"):
        made = plan(trace(load), 4, 8, policy=policy)
        assert made.linear < 0.8
        assert made.planned > 0.95
        made.placement.save(tmp_path / "placement.json")
        Placement.load(tmp_path / "placement.json").check_model(32, range(3), 4)
    assert plan(trace(load), 5, 8).linear != plan(trace(load), 5, 8).linear  # NaN: 32 on 5 ranks
    with pytest.raises(ValueError, match="1 groups of experts do not divide over 2 nodes"):
        plan(trace(load), 4, 8, num_nodes=2)
    with pytest.raises(ValueError, match="'least_movement' knows no nodes, got num_nodes=2"):
        plan(trace(load), 4, 8, num_groups=4, num_nodes=2, policy="least_movement")
    in_nodes = plan(trace(load), 4, 8, num_groups=4, num_nodes=2).placement
    first, second = (set(half.tolist()) for half in in_nodes.physical_to_logical_map[0].view(2, -1))
    assert not first & second
    with pytest.raises(ValueError, match="has no tokens"):
        plan(trace(load * 0), 4, 8)
    with pytest.raises(ExpertMapError, match="do not divide over 4 ranks; 8 redundant ones would"):
        plan(trace(load), 4, 7)

from dataclasses import replace
from pathlib import Path

import pytest
from plan_parallel import DEEPSEEK_V3, Deployment, Machine, dense_bytes, expert_bytes, page

from moezoo.tools.inspect import inspect

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"


DENSE = dense_bytes(DEEPSEEK_V3, "fp8_w8a8")


@pytest.fixture(scope="module")
def report():
    return inspect(DEEPSEEK_V3)


def test_the_page_has_what_the_script_prints(report):
    deployments = [Deployment(report, *it, DENSE) for it in ((8, 0), (32, 32), (320, 64))]
    _, _, rest = PAGE.read_text().partition("<!-- benchmarks/plan_parallel.py -->\n")
    assert rest.partition("<!-- end -->")[0] == page(deployments, 64, 4096)


def test_memory_is_what_inspect_says_where_both_do(report):
    for gpus in (1, 8, 64):
        held = Deployment(report, gpus, 0, dense_bytes(DEEPSEEK_V3, "bf16"))
        assert held.rank_expert_bytes + held.dense_bytes == report.weight_bytes["fp8_w8a8"][gpus]
    assert Deployment(report, 32, 32, DENSE).slots == 9
    assert Deployment(report, 320, 64, DENSE).slots == 1
    # attention, shared experts and dense layers in half as many bytes; the rest, kv_b included, not
    halved = 2 * (dense_bytes(DEEPSEEK_V3, "bf16") - DENSE)
    kept = 2 * 129280 * 7168 + 61 * 32768 * 512 + 58 * 256 * 7168
    assert halved / 2 == pytest.approx(
        report.parameters - 58 * 256 * 3 * 7168 * 2048 - kept, rel=2e-3
    )
    assert expert_bytes(report, "bf16") == 3 * 7168 * 2048 * 2


def test_a_token_goes_to_as_many_gpus_as_uniform_routing_gives(report):
    near, far = Deployment(report, 320, 64, DENSE).ranks_of_token()
    # one slot a GPU: 8 of 320, each as likely, one of them perhaps its own
    assert near + far == pytest.approx(8 * 319 / 320)
    assert near == pytest.approx(8 * 7 / 320)
    assert Deployment(report, 1, 0, DENSE).wire_bytes(64) == (0, 0)
    near, far = Deployment(report, 32, 32, DENSE).wire_bytes(1)
    assert (near + far) / 7.0 == pytest.approx(7168 * (1 + 4 / 128 + 2) + 64, rel=0.01)


def test_times_follow_from_rates(report):
    slow = Deployment(report, 32, 32, DENSE, machine=Machine(network_rate=5e9))
    fast = Deployment(report, 32, 32, DENSE)
    assert slow.seconds(64)["network"] == pytest.approx(10 * fast.seconds(64)["network"])
    assert fast.seconds(128)["products"] == pytest.approx(2 * fast.seconds(64)["products"])
    # every expert is hit: reading does not grow
    assert fast.seconds(4096)["reading experts"] == pytest.approx(9 * fast.expert_bytes / 3.03e12)
    with pytest.raises(ValueError, match="int4_w4a16 does not fit"):
        expert_bytes(replace(report, hidden_size=30), "int4_w4a16")

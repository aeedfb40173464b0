"""How long a rebalance takes to compute, how balanced it leaves the ranks, and what it moves.

    python benchmarks/eplb.py [--steps 1000] [--layers 58] [--repeats 5]

The policies are timed for 61 layers of 256 experts on 320 GPUs with 64 redundant experts, and on 32
with 32, by one thread. Then loads by Zipf's law (exponent 1, 256 experts, 32,768 routed tokens a
layer and step, 58 layers as in DeepSeek-V3) are simulated on 32 GPUs with 32 redundant experts: not
drifting, and with popularity that halves its correlation in 1,000, 300 and 100 intervals of 100
steps. A full reshuffle would fill every slot anew.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import write_result
from rich.console import Console

from moezoo.parallel.eplb import POLICIES, rebalanced
from moezoo.parallel.placement import initial_map
from moezoo.tools.balance import compare
from moezoo.tools.simulate import zipf_loads

INTERVAL = 100
HALF_LIVES = (None, 1000, 300, 100)
"""Steps, in intervals, in which popularity halves its correlation; None for no drift."""
EXPERT_BYTES = 3 * 7168 * 2048 + 4 * 3 * (7168 // 128) * (2048 // 128)
"""Bytes of an expert of DeepSeek-V3 in block fp8."""


def seconds(run: Callable[[], object], repeats: int) -> dict[str, float]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}


def policy_times(repeats: int) -> list[dict[str, Any]]:
    load = zipf_loads(1, 61, 256)[0]
    rows = []
    for gpus, redundant in ((320, 64), (32, 32)):
        slots = initial_map(256, redundant, gpus).expand(61, -1)
        for policy in POLICIES:

            def rebalance(policy: str = policy, slots: Any = slots, gpus: int = gpus) -> None:
                rebalanced(load, slots, num_ranks=gpus, policy=policy)

            rows.append(
                {
                    "layers": 61,
                    "experts": 256,
                    "gpus": gpus,
                    "redundant": redundant,
                    "policy": policy,
                    "seconds": seconds(rebalance, repeats),
                }
            )
            print(rows[-1])
    return rows


def simulations(steps: int, layers: int) -> list[dict[str, Any]]:
    found = []
    for half_life in HALF_LIVES:
        in_steps = None if half_life is None else half_life * INTERVAL
        comparison = compare(
            zipf_loads(steps, layers, 256, half_life=in_steps),
            num_ranks=[32],
            num_redundant=[32],
            windows=[INTERVAL // 3, INTERVAL],
            intervals=[INTERVAL],
            policies=POLICIES,
            expert_bytes=EXPERT_BYTES,
        )
        print(f"half-life of popularity: {half_life} intervals")
        Console().print(comparison)
        loads = {"zipf": 1.0, "experts": 256, "layers": layers, "steps": steps, "tokens": 32768}
        loads["half_life_in_intervals"] = half_life
        found.append({"loads": loads, **comparison.to_dict()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = {
        "policies": policy_times(arguments.repeats),
        "simulations": simulations(arguments.steps, arguments.layers),
    }
    print(write_result("eplb", "cpu", content))


if __name__ == "__main__":
    main()

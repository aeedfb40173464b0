"""`moezoo eplb`: where experts go on several GPUs."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezoo.cli.options import add_command, add_json, number
from moezoo.cli.output import DONE, reading, require_writable, save_plot, say, show
from moezoo.errors import naming_file

POLICIES = ("default", "least_movement")


def add(commands: Any) -> None:
    eplb = commands.add_parser("eplb", help="plan where experts go on several GPUs")
    actions = eplb.add_subparsers(title="actions", required=True, metavar="ACTION")
    at_least_1, at_least_0 = number(int, 1), number(int, 0)

    parser = add_command(
        actions,
        "plan",
        _eplb_plan,
        examples="""
eplb plan --trace trace.safetensors --gpus 8 --redundant 16 --output placement.json
""",
        help="a placement for the loads of a trace",
        description="Place experts, and copies of the busiest, for the loads that moezoo routing "
        'recorded;\neplb={"placement": FILE} starts from the file.',
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE")
    parser.add_argument("--gpus", type=at_least_1, required=True, metavar="N")
    parser.add_argument(
        "--redundant", type=at_least_0, default=0, metavar="N", help="copies of experts (default 0)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--policy", choices=POLICIES, default="default")
    parser.add_argument("--nodes", type=at_least_1, default=1, metavar="N", help="default 1")
    parser.add_argument(
        "--groups",
        type=at_least_1,
        default=1,
        metavar="N",
        help="groups of experts that stay on one node (default 1; as the router has them)",
    )

    parser = add_command(
        actions,
        "simulate",
        _eplb_simulate,
        examples="""
eplb simulate --trace trace.safetensors --gpus 8 16 --redundant 0 16 --interval 50 --plot eplb.png
eplb simulate --zipf 1 --half-life 100000 --gpus 32 --redundant 32 --interval 100 --json
""",
        help="balancedness over time, for different settings",
        description="Replay the loads of a trace, or made-up ones by Zipf's law, and tell how "
        "balanced ranks would have been\nand what would have moved. Options that take several "
        "values are tried in all combinations.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="of moezoo routing")
    source.add_argument(
        "--zipf", type=number(float, 0), metavar="S", help="the n-th most popular: n ** -S"
    )
    zipf = parser.add_argument_group("loads of --zipf")
    zipf.add_argument("--experts", type=at_least_1, default=256, metavar="N", help="default 256")
    zipf.add_argument("--layers", type=at_least_1, default=4, metavar="N", help="default 4")
    zipf.add_argument("--steps", type=number(int, 2), default=1000, metavar="N", help="def. 1000")
    zipf.add_argument(
        "--tokens",
        type=at_least_1,
        default=32768,
        metavar="N",
        help="routed to a layer's experts in a step (default 32768: 4096 tokens of 8 experts)",
    )
    zipf.add_argument(
        "--half-life",
        type=number(float, 1),
        metavar="STEPS",
        help="popularity correlates by 1/2 with itself so many steps before (default: no drift)",
    )
    zipf.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", type=at_least_1, nargs="+", required=True, metavar="N")
    parser.add_argument("--redundant", type=at_least_0, nargs="+", default=[0], metavar="N")
    parser.add_argument(
        "--window", type=at_least_1, nargs="+", metavar="N", help="steps (default: the interval)"
    )
    parser.add_argument(
        "--interval", type=at_least_1, nargs="+", metavar="N", help="steps (default: a tenth)"
    )
    parser.add_argument("--policy", choices=POLICIES, nargs="+", default=list(POLICIES))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    add_json(parser)


def _eplb_plan(arguments: argparse.Namespace) -> int:
    from moezoo.tools.balance import plan
    from moezoo.tools.routing import RoutingTrace

    require_writable(arguments, "output")
    with reading("--trace"):
        trace = RoutingTrace.load(arguments.trace)
    made = plan(
        trace,
        arguments.gpus,
        arguments.redundant,
        policy=arguments.policy,
        num_groups=arguments.groups,
        num_nodes=arguments.nodes,
    )
    with naming_file(arguments.output):
        made.placement.save(arguments.output)
    linear = "" if math.isnan(made.linear) else f"; linear and without copies {made.linear:.3f}"
    if not arguments.quiet:
        say(f"{arguments.output}: balancedness {made.planned:.3f} for the trace{linear}")
    return DONE


def _eplb_simulate(arguments: argparse.Namespace) -> int:
    from moezoo.tools.balance import compare, read_history
    from moezoo.tools.simulate import rebalances, zipf_loads

    require_writable(arguments, "plot")
    if arguments.trace is not None:
        with reading("--trace"):
            loads, trace = read_history(arguments.trace)
        expert_bytes = trace.about.get("expert_bytes")
        source = {"trace": str(arguments.trace), **trace.about}
    else:
        names = ("steps", "layers", "experts", "tokens", "half_life", "seed")
        source = {"zipf": arguments.zipf, **{name: getattr(arguments, name) for name in names}}
        expert_bytes = None
        loads = zipf_loads(
            arguments.steps,
            arguments.layers,
            arguments.experts,
            exponent=arguments.zipf,
            half_life=arguments.half_life,
            tokens=arguments.tokens,
            seed=arguments.seed,
        )
    intervals = arguments.interval or [max(1, len(loads) // 10)]
    comparison = compare(
        loads,
        num_ranks=arguments.gpus,
        num_redundant=arguments.redundant,
        windows=arguments.window,
        intervals=intervals,
        policies=arguments.policy,
        expert_bytes=expert_bytes,
    )
    for reason in comparison.skipped:
        say(f"left out: {reason}")
    for interval in intervals:
        if not arguments.quiet and not rebalances(len(loads), interval):
            say(
                f"--interval {interval}: no rebalance within the {len(loads)} steps; the first is "
                "due after a quarter of the interval"
            )
    show(replace(comparison, loads=source), as_json=arguments.json)
    save_plot(arguments.plot, comparison)
    return DONE

"""`moezoo inspect`: what a checkpoint holds and needs."""

import argparse
from typing import Any

from moezoo.cli.models import check_placement, check_revision, quieten
from moezoo.cli.options import INSPECT_CODES, add_command, add_hub, add_json, number
from moezoo.cli.output import DONE, PARTLY, show


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        help="tell what a checkpoint holds and needs, before downloading it",
        codes=INSPECT_CODES,
        examples="""
inspect deepseek-ai/DeepSeek-V3
inspect Qwen/Qwen3-30B-A3B --expert-parallel 8 --placement round_robin
inspect ./folder --json
""",
        description=(
            "Tell what a checkpoint holds and needs, from its config and the headers of its "
            "files; no weight is read.\nA model that moezoo cannot run is reported too, with the "
            "reason, and exit code 3."
        ),
    )
    add_hub(parser)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument(
        "--expert-parallel",
        type=number(int, 1),
        metavar="N",
        help="also what each of N ranks that share the experts reads and holds",
    )
    parser.add_argument(
        "--placement",
        default="linear",
        metavar="P",
        help="with --expert-parallel: linear (default), round_robin, or a placement file",
    )
    add_json(parser)


def _inspect(arguments: argparse.Namespace) -> int:
    from moezoo.tools.inspect import inspect

    check_placement(arguments.placement)
    check_revision(arguments, arguments.model)
    quieten(arguments)
    report = inspect(
        arguments.model,
        expert_parallel_size=arguments.expert_parallel,
        placement=arguments.placement,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
    )
    show(report, as_json=arguments.json)
    return DONE if report.supported else PARTLY

"""`moezoo doctor`: what works on this machine."""

import argparse
from typing import Any

from moezoo.cli.options import add_command, add_json
from moezoo.cli.output import DONE, FAILED, show


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        help="tell what works on this machine, and what is missing",
        description=(
            "Look at versions, GPUs, Triton, memory and the hub's cache, and run the small model "
            "of the package.\nThe exit code is 1 if something is broken; what is only missing "
            "says what for."
        ),
        examples="""
doctor
doctor --json
""",
    )
    add_json(parser)


def _doctor(arguments: argparse.Namespace) -> int:
    from moezoo.tools.doctor import examine

    diagnosis = examine()
    show(diagnosis, as_json=arguments.json)
    return FAILED if diagnosis.broken else DONE

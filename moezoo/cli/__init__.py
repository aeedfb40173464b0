"""The command line: a module per command, each with `add`, which describes the command, and the
function that runs it."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from time import sleep

from moezoo.cli import bench, completion, convert, doctor, eplb, generate, inspect, routing, tune
from moezoo.cli.options import EXIT_CODES, Parser
from moezoo.cli.output import FAILED, INTERRUPTED, code_of, ended_by_signals, listen, rank, say
from moezoo.cli.version import Version
from moezoo.errors import ExpertMapError, MoEZooError, RankError, naming_file

BEHIND_RANK_0 = 3.0
"""Seconds that other ranks hold back an error that rank 0 most likely has too: once rank 0 has
reported it and ends, torchrun ends them all."""

COMMANDS = (generate, inspect, convert, routing, eplb, tune, bench, doctor, completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else list(argv)
    listen(arguments)
    try:
        with ended_by_signals():
            code: int = arguments.run(arguments)
        with naming_file("stdout"):
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if rank() == 0:
            say("interrupted" + _how_to_go_on(arguments))
        return INTERRUPTED
    except SystemExit:  # of a signal
        if rank() == 0 and (how := _how_to_go_on(arguments)):
            with suppress(OSError):  # after SIGHUP the terminal may be gone
                say("interrupted" + how)
        raise
    except BrokenPipeError:
        # whoever read our output has gone; keep the interpreter from flushing into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (MoEZooError, ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        if rank() and isinstance(error, ValueError | ExpertMapError):
            sleep(BEHIND_RANK_0)  # who is still here afterwards is alone with it
        say(f"error: {error}")
        if isinstance(error, RankError) and "RANK" in os.environ:
            os._exit(FAILED)  # the GPU may wait for the lost rank, and a usual end for the GPU
        return code_of(error)


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if not hasattr(arguments, "overwrite") or arguments.output is None:
        return ""
    if arguments.overwrite:
        return "; leave out --overwrite to go on where it stopped"
    return "; the same command goes on where it stopped"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="moezoo",
        description="Run Mixture-of-Experts language models from Hugging Face checkpoints.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show versions and the GPU")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser

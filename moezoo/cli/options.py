"""Options that several commands share, and the parsers of their values."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moezoo.cli.output import USAGE
from moezoo.formats import QUANTIZATIONS

DTYPES = ("auto", "bfloat16", "float16", "float32")


_COMMON_CODES = """\
exit codes:
  0    all done
  1    a failure while running (the model cannot be loaded, out of memory, disk full)
  2    wrong options or bad input; nothing was done
"""
_ENDED = "  143  the same by SIGTERM (129 by SIGHUP)\n"
EXIT_CODES = f"""\
{_COMMON_CODES}  3    finished, but some prompts or input lines failed (each is named on stderr);
       inspect: moezoo cannot run the model (the report says why)
  130  interrupted; generate with --output: the same command without --overwrite
       goes on where it stopped
{_ENDED}"""
GENERATE_CODES = f"""\
{_COMMON_CODES}  3    finished, but some prompts or input lines failed (each is named on stderr)
  130  interrupted; with --output, the same command without --overwrite goes on
       where it stopped
{_ENDED}"""
INSPECT_CODES = f"""\
{_COMMON_CODES}  3    moezoo cannot run the model (the report says why)
  130  interrupted
{_ENDED}"""
OTHER_CODES = f"""\
{_COMMON_CODES}  130  interrupted; what was not finished is not kept
{_ENDED}"""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: str,
    codes: str = OTHER_CODES,
) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have; `examples` are lines without
    `moezoo`."""
    lines = "".join(f"  moezoo {line}\n" for line in examples.strip().splitlines())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{lines}\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    telling = parser.add_argument_group("what is told").add_mutually_exclusive_group()
    telling.add_argument("-q", "--quiet", action="store_true", help="only results and errors")
    telling.add_argument(
        "-v", "--verbose", action="store_true", help="also what moezoo and the libraries log"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--local-files-only", action="store_true", help="use the hub cache, never the network"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def add_quantization(parser: Any, help: str) -> None:
    parser.add_argument(
        "--quantization",
        type=quantization,
        metavar="SCHEME",
        help=f"{help}: {', '.join(QUANTIZATIONS)}, or JSON with its choices, such as "
        """'{"type": "int4_w4a16", "group_size": 64}'""",
    )


def quantization(text: str) -> Any:
    from moezoo.loaders.quantization import Quantization

    try:
        value = json.loads(text) if text.lstrip().startswith("{") else text
        Quantization.of(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}): expected one of {', '.join(QUANTIZATIONS)}, or JSON "
            """such as '{"type": "int4_w4a16"}'"""
        ) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is '', expected the name of a folder")
    return Path(text)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        number = kind(text)
        if not low <= number <= high:
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse names it when kind refuses the text
    return parse

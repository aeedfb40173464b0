"""Output of the commands: messages, files, and exit codes.

0 all done; 1 a failure while running; 2 wrong options or bad input; 3 finished, but some prompts or
input lines failed, or (inspect) moezoo cannot run the model; 130 interrupted; 128 and the number of
the signal that ended it: 143 for SIGTERM.
"""

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

from moezoo.errors import ExpertMapError, LoadImbalanceWarning, naming_file

DONE, FAILED, USAGE, PARTLY, INTERRUPTED = 0, 1, 2, 3, 130


def say(message: str) -> None:
    place = f"rank {rank()}: " if rank() else ""
    # At once, so that lines of several ranks do not mix.
    sys.stderr.write(f"moezoo: {place}{message}\n")
    sys.stderr.flush()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `SystemExit` for SIGTERM and SIGHUP in the block, so that nothing half-written is left.

    Not where something else is done about them, as nohup does, and not in ranks, which torchrun
    ends: they may wait for one another in calls that no signal interrupts.
    """
    if "RANK" in os.environ or current_thread() is not main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends two, and one is to clean up in peace
    sys.exit(128 + number)


def code_of(error: Exception) -> int:
    return USAGE if isinstance(error, ValueError | ExpertMapError) else FAILED


def show(subject: Any, *, as_json: bool) -> None:
    """Print a subject's table, or its `to_dict` as JSON, on stdout."""
    from rich.console import Console

    with naming_file("stdout"):
        if as_json:
            print(json.dumps(subject.to_dict(), indent=2))
        else:
            # Nothing is as wide as this; 80 columns, as a pipe has, would break paths and words.
            Console(width=None if sys.stdout.isatty() else 1000).print(subject)


def listen(arguments: argparse.Namespace) -> None:
    """Write what moezoo and the libraries below it log to stderr, for --verbose.

    Without, the first rank warns for all, but of loads, which only one rank of a group knows.
    """
    if rank() and not arguments.verbose:
        logging.basicConfig(level=logging.ERROR)
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", LoadImbalanceWarning)
    if arguments.verbose:
        logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
        logging.getLogger("moezoo").setLevel(logging.INFO)


@contextmanager
def reading(option: str) -> Iterator[None]:
    """Raise ValueError, naming the option, if the file that it names cannot be read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{option} cannot be read: {error}") from error


def require_writable(arguments: argparse.Namespace, *options: str) -> None:
    """Raise ValueError, before minutes are spent, if the file that an option names cannot be
    written, or what a plot needs is missing."""
    for option in options:
        path = getattr(arguments, option)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"--{option} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise ValueError(f"--{option} must be a file, and {path} is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"--{option} {path}: there is no permission to write it")
    if getattr(arguments, "plot", None) is not None:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise ValueError("--plot needs matplotlib: pip install 'moezoo[plots]'") from None
        kind = arguments.plot.suffix.removeprefix(".").lower()
        if kind and kind not in FigureCanvasBase.get_supported_filetypes():
            raise ValueError(f"--plot {arguments.plot}: expected .png, .svg or .pdf")


def save_plot(path: Path | None, subject: Any) -> None:
    if path is not None:
        with naming_file(path):
            subject.plot().savefig(path)

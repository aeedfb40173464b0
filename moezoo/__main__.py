"""`moezoo`, and `python -m moezoo`: the command line, which Ctrl-C ends while it starts too."""

import signal
import sys
from types import FrameType

# As in `moezoo.cli.output`, which may not be imported before the signals are caught.
INTERRUPTED = 130
SOON = 0.02
"""Seconds."""


def main() -> int:
    """Run the command line and return its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
    try:
        from moezoo.cli import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, once nothing is being imported: torch and transformers lose that
    exception there, or make another of it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.setitimer(signal.ITIMER_REAL, SOON)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

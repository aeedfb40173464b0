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
        sys.unraisablehook = _unraisable
    try:
        from moezoo.cli import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; while something is imported, later, as torch and transformers lose
    it there, or make another exception of it. What is raised later is raised until it is handled.
    """
    later = number == signal.SIGALRM
    importing = _imports(frame)
    if later or importing:
        signal.setitimer(signal.ITIMER_REAL, SOON)
    if not importing and not (later and _interrupted(sys.exception())):
        raise KeyboardInterrupt


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """What a finalizer raises: KeyboardInterrupt that came in one is raised again soon."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, SOON)
    else:
        sys.__unraisablehook__(lost)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _interrupted(error: BaseException | None) -> bool:
    """Whether what is being handled is KeyboardInterrupt, or came of it: somebody cleans up."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


if __name__ == "__main__":
    sys.exit(main())

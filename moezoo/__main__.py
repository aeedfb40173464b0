"""Entry point of `moezoo` and `python -m moezoo`, which Ctrl-C ends cleanly during imports too."""

import signal
import sys
from types import FrameType

# As in `moezoo.cli.output`, which is imported only after the signal handlers are set.
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
    """Raise KeyboardInterrupt; during an import, after it, since torch and transformers lose the
    exception there or turn it into another one, and not while a lock is taken or given back. It is
    raised again until somebody handles it.
    """
    later = number == signal.SIGALRM
    not_now = _imports(frame) or _enters_or_leaves(frame)
    if later or not_now:
        signal.setitimer(signal.ITIMER_REAL, SOON)
    if not not_now and not (later and _interrupted(sys.exception())):
        raise KeyboardInterrupt


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Raise a KeyboardInterrupt that a finalizer lost again soon; print any other exception."""
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


def _enters_or_leaves(frame: FrameType | None) -> bool:
    """Whether a `with` statement begins or ends: an exception in the __enter__ of a condition of
    threading's leaves its lock taken for ever, and pools then wait for their threads for ever."""
    return frame is not None and frame.f_code.co_name in ("__enter__", "__exit__")


def _interrupted(error: BaseException | None) -> bool:
    """Whether the exception being handled is a KeyboardInterrupt, or came while one was handled."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


if __name__ == "__main__":
    sys.exit(main())

"""Progress of a run over many prompts: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def bar(total: int, finished: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr. Yields a function to call with each finished prompt's number of new
    tokens."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    started, num_tokens = time.perf_counter(), 0
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=finished, rate=0.0)

        def advance(new_tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += new_tokens
            bar.update(task, advance=1, rate=num_tokens / (time.perf_counter() - started))

        yield advance


class Lines:
    """Progress as lines of text, passed to `say` now and then."""

    def __init__(self, total: int, finished: int, say: Callable[[str], None]) -> None:
        self.say = say
        self.total, self.before, self.finished, self.num_tokens = total, finished, finished, 0
        self.started = self.said = time.perf_counter()

    def advance(self, num_tokens: int) -> None:
        self.finished += 1
        self.num_tokens += num_tokens
        now = time.perf_counter()
        if now - self.said < SECONDS_BETWEEN_LINES and self.finished < self.total:
            return
        self.said = now
        elapsed = now - self.started
        left = elapsed / (self.finished - self.before) * (self.total - self.finished)
        self.say(
            f"{self.finished}/{self.total} prompts, {self.num_tokens / elapsed:.0f} tokens/s, "
            f"{timedelta(seconds=round(left))} left"
        )

"""Which ranks of a job live, and how far each has come: what an error says of a collective that
failed, and how ranks wait for each other where no time is known beforehand.

Every rank has a thread that writes to the job's store that it lives. Threads run while a rank
waits in a collective, reads a file or compiles, and stop when its process dies or is stopped.
"""

import json
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from moezoo.errors import RankError

_log = logging.getLogger(__name__)

_LOOKS = 5
"""A rank that says nothing for so many intervals is gone."""


class _Sign:
    """What a rank says of itself."""

    def __init__(self) -> None:
        self.beats = 0
        self.collectives = 0
        """That it has begun."""
        self.doing = "starting"
        self.over = threading.Event()

    def __str__(self) -> str:
        return json.dumps([self.beats, self.collectives, self.doing])


class Watch:
    """The signs of life of all ranks of a job.

    Args:
        store: that of the job, for this object alone.
        timeout: seconds in which an error comes, at the latest.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.interval = _interval(timeout)
        self._sign = _Sign()
        self._meetings = 0
        store.set(f"sign/{rank}", str(self._sign))
        thread = threading.Thread(
            target=_beat,
            args=(store.clone(), rank, world_size, self._sign, timeout),  # type: ignore[attr-defined]
            name="moezoo signs of life",
            daemon=True,
        )
        thread.start()
        weakref.finalize(self, _leave, store, rank, self._sign, thread)

    def begins(self, doing: str) -> None:
        """This rank begins a collective."""
        self._sign.collectives += 1
        self._sign.doing = doing

    @contextmanager
    def named(self, doing: str, ranks: Sequence[int] | None = None) -> Iterator[None]:
        """A RuntimeError of torch.distributed in the block becomes a `RankError` that names which
        of the ranks (all by default) are gone, or behind."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(self._blame(doing, ranks, error)) from error

    def exchange(self, what: str, text: str, *, patient: bool = False) -> list[str]:
        """The text of every rank, in their order; each gives its own, in the same order of calls.

        Raises RankError for a rank that is gone, or does not come within the time-out; `patient`
        ranks wait as long as all live.
        """
        return self._meet(what, text, limit=None if patient else self.timeout)

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """The block ends when all ranks are through theirs, however long that takes.

        Raises RankError where one is gone, or fails in its block: with what it said.
        """
        self._sign.doing = doing
        with self.telling():
            yield
        self._meet(doing, "", limit=None)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error in the block reaches the ranks that wait for this one in `together` or
        `exchange`."""
        try:
            yield
        except BaseException as error:
            # The others need not wait; if they cannot be told, the error is this one all the same.
            with _unheard():
                self._put(self._meetings, f"!{type(error).__name__}: {error}")
            raise

    def leave(self) -> None:
        """The last that a rank says. Rank 0, which may hold the store, waits for that of all."""
        with _unheard():
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                keys = [f"left/{rank}" for rank in range(self.world_size)]
                self.store.wait(keys, timedelta(seconds=self.timeout))
            else:
                self.store.check([f"left/{self.rank}"])  # answers only when that is there
        self._sign.over.set()

    def _put(self, meeting: int, text: str) -> None:
        self.store.set(f"meeting/{meeting}/{self.rank}", text)

    def _meet(self, what: str, text: str, *, limit: float | None) -> list[str]:
        meeting = self._meetings
        self._meetings += 1
        self._sign.doing = what
        with self.named(what):
            self._put(meeting, f"={text}")
            came: dict[int, str] = {}
            begin = time.monotonic()
            heard = dict.fromkeys(range(self.world_size), (begin, ""))
            pause = 0.005
            while True:
                for rank in set(range(self.world_size)) - came.keys():
                    key = f"meeting/{meeting}/{rank}"
                    if self.store.check([key]):
                        said = self.store.get(key).decode()
                        if said.startswith("!"):
                            raise RankError(f"rank {rank} failed while {what}: {said[1:]}")
                        came[rank] = said[1:]
                absent = sorted(set(range(self.world_size)) - came.keys())
                if not absent:
                    return [came[rank] for rank in range(self.world_size)]
                now = time.monotonic()
                signs = self._signs(absent)
                heard.update(
                    (rank, (now, signs[rank])) for rank in absent if signs[rank] != heard[rank][1]
                )
                silent = [rank for rank in absent if now - heard[rank][0] > self.timeout / 2]
                if silent:
                    raise RankError(
                        f"{_named(silent)} gave no sign of life for {self.timeout / 2:g} s while "
                        f"the others were {what}"
                    )
                if limit is not None and now - begin > limit:
                    raise RankError(
                        f"{_named(absent)} did not come to {what} within {limit:g} s: "
                        f"{_places(absent, signs)}"
                    )
                time.sleep(pause)
                pause = min(2 * pause, self.interval)

    def _signs(self, ranks: Sequence[int]) -> dict[int, str]:
        """What each rank last said; nothing of one that has not begun."""
        keys = {rank: f"sign/{rank}" for rank in ranks}
        return {
            rank: self.store.get(key).decode() if self.store.check([key]) else ""
            for rank, key in keys.items()
        }

    def _blame(self, doing: str, ranks: Sequence[int] | None, error: RuntimeError) -> str:
        others = [r for r in ranks or range(self.world_size) if r != self.rank]
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        try:
            before = self._signs(others)
            time.sleep(_LOOKS * self.interval)
            after = self._signs(others)
            told = [r for r in others if self.store.check([f"fault/{r}"])]
            silent = [r for r in others if before[r] == after[r]]
            # One that found a fault itself may be gone since.
            gone = [r for r in silent if r not in told] or silent
            self.store.set(f"fault/{self.rank}", "")
        except RuntimeError:
            return (
                f"while {doing}: {said}; the job's store does not answer either, so the process "
                "that holds it (rank 0, or torchrun) is gone"
            )
        if gone:
            return f"{_named(gone)} gave no sign of life while {doing}: {said}"
        counts = {r: json.loads(sign)[1] for r, sign in after.items() if sign}
        behind = [r for r, count in counts.items() if count < self._sign.collectives]
        if behind:
            return f"{_named(behind)} did not come while {doing}: {_places(behind, after)}; {said}"
        return f"while {doing}, with all ranks alive: {said}"


def _beat(store: Store, rank: int, world_size: int, sign: _Sign, timeout: float) -> None:
    """Write that this rank lives, and say so if the next one does not: NCCL ends a process that
    waits too long without a word of whom it waited for."""
    neighbour = (rank + 1) % world_size
    heard, last = time.monotonic(), ""
    with _unheard():  # without a store there is nobody to tell
        while not sign.over.wait(_interval(timeout)):
            sign.beats += 1
            store.set(f"sign/{rank}", str(sign))
            key = f"sign/{neighbour}"
            said = store.get(key).decode() if store.check([key]) else ""
            if said != last or not said:
                heard, last = time.monotonic(), said
            elif time.monotonic() - heard > timeout / 2:
                _log.error(
                    "rank %d has given no sign of life for %g s; ranks that wait for it stop "
                    "%g s after they began to",
                    *(neighbour, timeout / 2, timeout),
                )
                heard = time.monotonic() + threading.TIMEOUT_MAX  # once is enough


def _leave(store: Store, rank: int, sign: _Sign, thread: threading.Thread) -> None:
    """This rank ends, or needs the others no more."""
    sign.over.set()
    # A thread that is inside the store when Python ends would end the process with an abort.
    if thread is not threading.current_thread():
        thread.join(timeout=5)
    with _unheard():
        store.set(f"sign/{rank}", "")


def _interval(timeout: float) -> float:
    return min(1.0, timeout / 20)


@contextmanager
def _unheard() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        return


def _named(ranks: Sequence[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))}"


def _places(ranks: Sequence[int], signs: Mapping[int, str]) -> str:
    said = ((rank, signs[rank]) for rank in ranks)
    return ", ".join(
        f"rank {rank} was last {json.loads(sign)[2] if sign else 'not there'}"
        for rank, sign in said
    )

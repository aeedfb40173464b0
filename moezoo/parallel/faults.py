"""Fault detection: which ranks of a job are alive, and how far each has come.

Errors of collectives can then name the rank at fault, and ranks can wait for each other without a
time limit. A thread of each rank writes heartbeats to the job's store. It runs while the rank waits
in a collective, reads a file or compiles, and stops when the process dies or is stopped.
"""

import json
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from moezoo.errors import RankError

_LOOKS = 5
"""Number of intervals without a heartbeat after which a rank is taken for gone."""

_PATIENCE = 1.1
"""Number of time-outs after which a rank whose GPU waits in vain ends: later than failing calls."""

_TOLD = "told_to_other_ranks"
"""Attribute of an error for which all ranks have counted a meeting already, so that their numbers
of meetings still agree where the error is caught."""

_LOOKED_AT = 32
"""Number of ranks that a rank looks at per interval, since all of them would burden the store."""


class _Sign:
    """The state that a rank writes to the store: its heartbeat."""

    def __init__(self) -> None:
        self.beats = 0
        self.collectives = 0
        """Number of collectives that this rank has begun."""
        self.doing = "starting"
        self.awaits: deque[int] = deque()
        """Ranks that must come to this rank's collectives, or its process is ended."""
        self.over = threading.Event()

    def __str__(self) -> str:
        return json.dumps([self.beats, self.collectives, self.doing])


class RankWatch:
    """Watches the heartbeats of all ranks of a job, and writes this rank's.

    Args:
        store: the job's store, with a prefix or connection of this object's own.
        timeout: seconds after which waiting for another rank is an error.
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
            args=(store.clone(), rank, self._sign, timeout),  # type: ignore[attr-defined]
            name="moezoo signs of life",
            daemon=True,
        )
        thread.start()
        weakref.finalize(self, _leave, store, rank, self._sign, thread)

    def end_if_kept_waiting(self, ranks: Sequence[int]) -> None:
        """From now on, end this process with a message if one of these ranks does not come to a
        collective within 1.1 time-outs after this rank began it.

        This is for GPUs, where no call fails: kernels just wait, until NCCL ends the process
        without naming the rank that it waited for.
        """
        self._sign.awaits = deque(rank for rank in ranks if rank != self.rank)

    def begins(self, doing: str) -> None:
        """Count a collective that this rank begins."""
        self._sign.collectives += 1
        self._sign.doing = doing

    @contextmanager
    def named(self, doing: str, ranks: Sequence[int] | None = None) -> Iterator[None]:
        """Turn a RuntimeError of torch.distributed in the block into a `RankError` that names the
        ranks, of `ranks` or by default all, that are gone or behind."""
        try:
            yield
        except RuntimeError as error:
            raise self.fault(doing, error, ranks) from error

    def fault(
        self, doing: str, error: RuntimeError, ranks: Sequence[int] | None = None
    ) -> RankError:
        """Return the `RankError` that `named` raises for an error of torch.distributed."""
        self._sign.awaits = deque()  # this error names the rank, so the process need not be ended
        return RankError(self._blame(doing, ranks, error))

    def exchange(self, what: str, text: str, *, patient: bool = False) -> list[str]:
        """Return the texts of all ranks, in order of ranks; all of them call this.

        Raises RankError for a rank that is gone, or does not come within the time-out; `patient`
        ranks wait as long as all are alive.
        """
        return self._meet(what, text, limit=None if patient else self.timeout)

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Leave the block when all ranks have finished theirs, however long that takes.

        Raises RankError, with the other's message, where a rank is gone or fails in its block.
        """
        self._sign.doing = doing
        with self.reporting_errors():
            yield
        self._meet(doing, "", limit=None)

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Report an error in the block to the other ranks: to those that wait in `together` or
        `exchange`, and to those whose collective fails because of it."""
        try:
            yield
        except BaseException as error:
            if _TOLD not in vars(error):
                self._tell(error)
            raise

    def leave(self) -> None:
        """Write this rank's last sign. Rank 0, which may hold the store, waits for that of all."""
        with _ignoring_store_errors():
            self.store.set(f"sign/{self.rank}", str(self._sign))
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                keys = [f"left/{rank}" for rank in range(self.world_size)]
                self.store.wait(keys, timedelta(seconds=self.timeout))
            else:
                self.store.check([f"left/{self.rank}"])  # answers only once the key has arrived
        self._sign.over.set()

    def _tell(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {error}"
        # The others need not wait then. If they cannot be told, this error is still the one to see.
        with _ignoring_store_errors():
            self._put(self._meetings, f"!{said}")
            if not isinstance(error, RankError):
                failure = json.dumps([self._sign.collectives, said])
                self.store.set(f"failure/{self.rank}", failure)
        self._meetings += 1
        vars(error)[_TOLD] = True

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
                            heard_of = RankError(f"rank {rank} failed while {what}: {said[1:]}")
                            vars(heard_of)[_TOLD] = True
                            raise heard_of
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
        """Return the last sign of each rank; an empty text for one that has not started."""
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
            # A rank that found the fault itself may have ended since.
            gone = [r for r in silent if r not in told] or silent
            self.store.set(f"fault/{self.rank}", "")
            failed = [r for r in others if self.store.check([f"failure/{r}"])]
            failures = {r: json.loads(self.store.get(f"failure/{r}")) for r in failed}
        except RuntimeError:
            return (
                f"while {doing}: {said}; the job's store does not answer either, so the process "
                "that holds it (rank 0, or torchrun) is gone"
            )
        counts = {r: json.loads(sign)[1] for r, sign in after.items() if sign}
        for rank, (count, reason) in failures.items():
            if counts[rank] <= count:  # it has not gone on since
                return f"rank {rank} failed, and this one was {doing}: {reason}"
        if gone:
            return f"{_named(gone)} gave no sign of life while {doing}: {said}"
        behind = [r for r, count in counts.items() if count < self._sign.collectives]
        if behind:
            return f"{_named(behind)} did not come while {doing}: {_places(behind, after)}; {said}"
        return f"while {doing}, with all ranks alive: {said}"


def _beat(store: Store, rank: int, sign: _Sign, timeout: float) -> None:
    """Write heartbeats, and end the process if it waits for another rank in vain."""
    began: deque[tuple[float, int]] = deque()
    heard: dict[int, tuple[float, str]] = {}
    with _ignoring_store_errors():  # without a store there is nobody to tell
        while not sign.over.wait(_interval(timeout)):
            sign.beats += 1
            store.set(f"sign/{rank}", str(sign))
            awaits = sign.awaits
            now = time.monotonic()
            began.append((now, sign.collectives))
            while len(began) > 1 and now - began[1][0] >= _PATIENCE * timeout:
                began.popleft()
            for _ in range(min(_LOOKED_AT, len(awaits))):
                other = awaits[0]
                awaits.rotate(-1)
                said = store.get(f"sign/{other}").decode()
                if other not in heard or said != heard[other][1]:
                    heard[other] = now, said
            if sign.awaits and now - began[0][0] >= _PATIENCE * timeout:
                _end_if_late(store, began[0][1], heard, sign, now=now, timeout=timeout)


def _end_if_late(
    store: Store,
    begun: int,
    heard: Mapping[int, tuple[float, str]],
    sign: _Sign,
    *,
    now: float,
    timeout: float,
) -> None:
    """End the process if a rank has not yet begun the collectives that this one had begun a
    time-out ago."""

    def behind(signs: Mapping[int, str]) -> list[int]:
        return [other for other, said in signs.items() if json.loads(said)[1] < begun]

    late = behind({other: said for other, (_, said) in heard.items()})
    # What was heard of some ranks may be old.
    signs = {other: store.get(f"sign/{other}").decode() for other in late}
    late = behind(signs)
    if not late:
        return
    silent = [other for other in late if now - heard[other][0] > timeout / 2]
    if silent:
        what = f"{_named(silent)} gave no sign of life for {timeout / 2:g} s"
    else:
        what = f"{_named(late)} did not come within {timeout:g} s: {_places(late, signs)}"
    sys.stderr.write(f"RankError: {what}; this rank was {sign.doing}, and ends\n")
    sys.stderr.flush()
    time.sleep(2 * _interval(timeout))  # others may look into a store that this process holds
    os._exit(1)  # a usual end would wait for the GPU


def _leave(store: Store, rank: int, sign: _Sign, thread: threading.Thread) -> None:
    """Stop the heartbeat of a rank that ends, or no longer needs the others."""
    sign.over.set()
    # A thread that is inside the store when Python ends would end the process with an abort.
    if thread is not threading.current_thread():
        thread.join(timeout=5)
    sign.doing = "leaving"
    with _ignoring_store_errors():
        store.set(f"sign/{rank}", str(sign))  # others may still look how far it came


def _interval(timeout: float) -> float:
    return min(1.0, timeout / 20)


@contextmanager
def _ignoring_store_errors() -> Iterator[None]:
    """Ignore a store that no longer answers."""
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

"""Which ranks of a job live, and how far each has come: what an error says of a collective that
failed, and how ranks wait for each other where no time is known beforehand.

Every rank has a thread that writes to the job's store that it lives. Threads run while a rank
waits in a collective, reads a file or compiles, and stop when its process dies or is stopped.
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
"""A rank that says nothing for so many intervals is gone."""

_PATIENCE = 1.1
"""Time-outs after which a rank that waits for a GPU ends: where a call fails, that is sooner."""

_TOLD = "told_to_other_ranks"
"""An attribute of an error that all ranks have counted a meeting for, so that they go on with the
same one where it is caught."""

_LOOKED_AT = 32
"""Ranks in an interval: all of them would be many questions to one store."""


class _Sign:
    """What a rank says of itself."""

    def __init__(self) -> None:
        self.beats = 0
        self.collectives = 0
        """That it has begun."""
        self.doing = "starting"
        self.awaits: deque[int] = deque()
        """Ranks without which this one ends."""
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
            args=(store.clone(), rank, self._sign, timeout),  # type: ignore[attr-defined]
            name="moezoo signs of life",
            daemon=True,
        )
        thread.start()
        weakref.finalize(self, _leave, store, rank, self._sign, thread)

    def end_if_kept_waiting(self, ranks: Sequence[int]) -> None:
        """From now on, end this process with a message if one of these ranks does not come to a
        collective, within the time-out and a tenth of it, after this rank began it.

        That is for GPUs, where no call fails: what is launched just waits, and NCCL ends the
        process in the end without a word of whom it waited for.
        """
        self._sign.awaits = deque(rank for rank in ranks if rank != self.rank)

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
            raise self.fault(doing, error, ranks) from error

    def fault(
        self, doing: str, error: RuntimeError, ranks: Sequence[int] | None = None
    ) -> RankError:
        """What `named` raises for an error of torch.distributed."""
        self._sign.awaits = deque()  # whoever catches this has been told
        return RankError(self._blame(doing, ranks, error))

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
        `exchange`, and is named by those that find it gone from a collective."""
        try:
            yield
        except BaseException as error:
            if _TOLD not in vars(error):
                self._tell(error)
            raise

    def leave(self) -> None:
        """The last that a rank says. Rank 0, which may hold the store, waits for that of all."""
        with _unheard():
            self.store.set(f"sign/{self.rank}", str(self._sign))
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                keys = [f"left/{rank}" for rank in range(self.world_size)]
                self.store.wait(keys, timedelta(seconds=self.timeout))
            else:
                self.store.check([f"left/{self.rank}"])  # answers only when that is there
        self._sign.over.set()

    def _tell(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {error}"
        # The others need not wait; if they cannot be told, the error is this one all the same.
        with _unheard():
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
    """Write that this rank lives, and look whether it waits for others in vain."""
    began: deque[tuple[float, int]] = deque()
    heard: dict[int, tuple[float, str]] = {}
    with _unheard():  # without a store there is nobody to tell
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
    """This rank had begun so many collectives a time-out ago."""

    def behind(signs: Mapping[int, str]) -> list[int]:
        return [other for other, said in signs.items() if json.loads(said)[1] < begun]

    late = behind({other: said for other, (_, said) in heard.items()})
    # Some may not have been looked at for a while.
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
    """This rank ends, or needs the others no more."""
    sign.over.set()
    # A thread that is inside the store when Python ends would end the process with an abort.
    if thread is not threading.current_thread():
        thread.join(timeout=5)
    sign.doing = "leaving"
    with _unheard():
        store.set(f"sign/{rank}", str(sign))  # how far it came: others may still look


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

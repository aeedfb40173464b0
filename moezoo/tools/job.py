"""A run of `moezoo generate` by many processes: rank 0 deals the prompts to the ranks and collects
all completions."""

import dataclasses
import heapq
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from moezoo.generation.texts import Completion, Prompt
from moezoo.parallel.mailbox import Mailbox
from moezoo.parallel.mesh import Mesh

_SECONDS = 0.2
"""Seconds between two checks for messages of other ranks."""


class Job:
    """This process's part in such a run.

    Ranks with the same tokens (dispatch="all_gather") get the same prompts; only the first of them
    hands its completions on.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._mailbox = Mailbox(mesh)
        alike = mesh.ep_size if mesh.parallel.dispatch == "all_gather" else 1
        self._parts = [rank // alike for rank in range(mesh.world_size)]
        self._speaks = mesh.rank % alike == 0

    @property
    def leads(self) -> bool:
        return self.mesh.rank == 0

    def failing_together(self) -> AbstractContextManager[None]:
        """Report an error in the block to the ranks that wait for this one."""
        return self.mesh.watch.reporting_errors()

    def deal(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return this rank's share of the prompts; rank 0 deals them to all ranks."""
        sizes = [len(json.dumps(prompt.prompt)) for prompt in prompts]
        dealt = shares(sizes, len(set(self._parts)))
        texts = [
            json.dumps([dataclasses.astuple(prompts[i]) for i in dealt[part]])
            for part in self._parts
        ]
        self._mailbox.scatter(texts)
        self.begin(None)
        return self.dealt()

    def dealt(self) -> list[Prompt]:
        return [Prompt(*record) for record in json.loads(self._mailbox.scattered())]

    def begin(self, code: int | None) -> int | None:
        """Wait until all ranks are there; return rank 0's exit code if they should end instead."""
        return self._of_rank_0("reading prompts", code)

    def end(self, code: int | None) -> int | None:
        """Wait until all is written; return the exit code, which is rank 0's."""
        return self._of_rank_0("writing completions", code)

    def _of_rank_0(self, doing: str, code: int | None) -> int | None:
        first: int | None = json.loads(
            self.mesh.watch.exchange(doing, json.dumps(code), patient=True)[0]
        )
        return first

    def hand_on(self, completions: Iterable[Completion]) -> None:
        """Send this rank's completions to rank 0 as they are made."""
        for completion in completions:
            if self._speaks:
                record = dataclasses.asdict(completion) | {"prompt": None}
                self._mailbox.send(json.dumps(record))
        self._num_sent()

    def _num_sent(self) -> int:
        """Wait until all ranks have sent all completions; return how many they are."""
        own = str(self._mailbox.num_sent)
        told = self.mesh.watch.exchange("completing prompts", own, patient=True)
        return sum(map(int, told))

    def collect(
        self,
        completions: Iterable[Completion],
        prompts: Sequence[Prompt],
        take: Callable[[Completion], None],
    ) -> None:
        """Pass rank 0's completions, and those that others send, on as they come.

        Each is of one of these prompts. They are passed on one at a time, from any thread.
        """
        texts = {prompt.id: prompt.prompt for prompt in prompts}
        over, lock = False, threading.Lock()

        def take_one(completion: Completion) -> None:
            nonlocal over
            with lock:
                if over:
                    return  # a line may be half written, and nothing may follow it
                over = True
                take(completion)
                over = False

        def take_sent() -> None:
            for text in self._mailbox.received():
                record = json.loads(text)
                record |= {
                    "prompt": texts[record["id"]],
                    "token_ids": tuple(record["token_ids"]),
                }
                take_one(Completion(**record))

        def look() -> None:
            try:
                take_sent()
            except Exception as error:
                self._mailbox.stop(f"rank 0 failed while taking completions: {error}")
                raise

        with _repeated(look) as check:
            for completion in completions:
                check()
                take_one(completion)
            total = self._num_sent()
        while self._mailbox.num_received < total:
            take_sent()


@contextmanager
def _repeated(look: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call `look` repeatedly in a thread while the block runs, and once more when it ends.

    Yields a function that raises the error of the thread, if there was one.
    """
    over = threading.Event()
    errors: list[Exception] = []

    def check() -> None:
        if errors:
            raise errors[0]

    def repeat() -> None:
        try:
            while not over.wait(_SECONDS):
                look()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=repeat, name="moezoo completions of other ranks", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
        check()
        look()


def shares(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return for each rank the indices of its prompts, such that the sums of sizes are even.

    The longest prompts are dealt first, each to the rank with the smallest sum.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = loads[0]
        dealt[rank].append(i)
        # A short prompt is work too: its completion.
        heapq.heapreplace(loads, (load + sizes[i] + 64, rank))
    return [sorted(numbers) for numbers in dealt]

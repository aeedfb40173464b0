"""Texts between rank 0 and the others, by the job's store: not for what is in a hurry."""

from collections.abc import Iterator, Sequence

from moezoo.errors import RankError
from moezoo.parallel.mesh import Mesh

_BYTES = 1 << 20
"""Of one entry in the store, where a text may be cut."""


class Post:
    """Each rank's texts to rank 0, and rank 0's to each."""

    def __init__(self, mesh: Mesh) -> None:
        self._rank, self._world_size = mesh.rank, mesh.world_size
        # One of its own: a thread may wait for the other's answer.
        self._store = mesh.watch.store.clone()  # type: ignore[attr-defined]
        self._sent = 0
        self._received = [0] * mesh.world_size

    def send(self, text: str) -> None:
        """To rank 0. Raises RankError if that has stopped taking them."""
        if self._store.check(["stopped"]):
            raise RankError(self._store.get("stopped").decode())
        self._store.set(f"post/{self._rank}/{self._sent}", text)
        self._sent += 1

    @property
    def num_sent(self) -> int:
        return self._sent

    def received(self) -> Iterator[str]:
        """What has come to rank 0 and was not taken before."""
        for rank in range(self._world_size):
            while self._store.check([key := f"post/{rank}/{self._received[rank]}"]):
                text = self._store.get(key).decode()
                self._store.delete_key(key)
                self._received[rank] += 1
                yield text

    def stop(self, reason: str) -> None:
        """As rank 0, take no more."""
        self._store.set("stopped", reason)

    @property
    def num_received(self) -> int:
        return sum(self._received)

    def deal(self, texts: Sequence[str]) -> None:
        """Give each rank its text, as rank 0."""
        for rank, text in enumerate(texts):
            octets = text.encode()
            pieces = [octets[i : i + _BYTES] for i in range(0, len(octets), _BYTES)]
            for i, piece in enumerate(pieces):
                self._store.set(f"dealt/{rank}/{i}", piece)
            self._store.set(f"dealt/{rank}", str(len(pieces)))

    def dealt(self) -> str:
        """This rank's, once it is there."""
        number = int(self._store.get(f"dealt/{self._rank}"))
        pieces = (self._store.get(f"dealt/{self._rank}/{i}") for i in range(number))
        return b"".join(pieces).decode()

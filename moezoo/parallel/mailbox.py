"""Slow messages between rank 0 and the other ranks, through the job's store."""

from collections.abc import Iterator, Sequence

from moezoo.errors import RankError
from moezoo.parallel.mesh import Mesh

_BYTES = 1 << 20
"""Size of the pieces in which a text is stored."""


class Mailbox:
    """Sends texts from each rank to rank 0, and one text from rank 0 to each rank."""

    def __init__(self, mesh: Mesh) -> None:
        self._rank, self._world_size = mesh.rank, mesh.world_size
        # A connection of its own: on a shared one, a thread may wait for another's answer.
        self._store = mesh.watch.store.clone()  # type: ignore[attr-defined]
        self._sent = 0
        self._received = [0] * mesh.world_size

    def send(self, text: str) -> None:
        """Send a text to rank 0. Raises RankError if rank 0 has called `stop`."""
        if self._store.check(["stopped"]):
            raise RankError(self._store.get("stopped").decode())
        self._store.set(f"post/{self._rank}/{self._sent}", text)
        self._sent += 1

    @property
    def num_sent(self) -> int:
        return self._sent

    def received(self) -> Iterator[str]:
        """Yield, on rank 0, the texts that have arrived since the last call."""
        for rank in range(self._world_size):
            while self._store.check([key := f"post/{rank}/{self._received[rank]}"]):
                text = self._store.get(key).decode()
                self._store.delete_key(key)
                self._received[rank] += 1
                yield text

    def stop(self, reason: str) -> None:
        """Refuse further texts, on rank 0: `send` raises `reason` on the others."""
        self._store.set("stopped", reason)

    @property
    def num_received(self) -> int:
        return sum(self._received)

    def scatter(self, texts: Sequence[str]) -> None:
        """Send to each rank its own of `texts`, on rank 0; `scattered` receives it."""
        for rank, text in enumerate(texts):
            octets = text.encode()
            pieces = [octets[i : i + _BYTES] for i in range(0, len(octets), _BYTES)]
            for i, piece in enumerate(pieces):
                self._store.set(f"dealt/{rank}/{i}", piece)
            self._store.set(f"dealt/{rank}", str(len(pieces)))

    def scattered(self) -> str:
        """Wait for the text that `scatter` sends to this rank, and return it."""
        number = int(self._store.get(f"dealt/{self._rank}"))
        pieces = (self._store.get(f"dealt/{self._rank}/{i}") for i in range(number))
        return b"".join(pieces).decode()

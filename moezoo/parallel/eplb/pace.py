"""How much of experts' weights travels between two steps of a model."""

import statistics
import time
from collections import deque

SHARE = 0.03
"""Of a step's time, in which pieces travel."""

WIRE = 50e9
"""Bytes a second, of a rank, until a piece has been timed: a network's rather than NVLink's."""

LEAST, MOST = 1 << 20, 256 << 20
"""Bytes of a piece. Smaller ones are mostly latency."""

LAST_STEPS = 64


class Pace:
    """Knows how long steps take, by the host's clock: it is never ahead by more than a few."""

    def __init__(self, *, least: int = LEAST, most: int = MOST) -> None:
        self._least, self._most = least, most
        self._seconds: deque[float] = deque(maxlen=LAST_STEPS)
        self._last: float | None = None

    def step(self) -> None:
        """One has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def bytes_in_a_share(self, bytes_per_second: float | None) -> float:
        """What a wire of this rate carries in SHARE of a step."""
        step = statistics.median(self._seconds) if self._seconds else 0.0
        return SHARE * step * (bytes_per_second or WIRE)

    def piece_bytes(self, in_a_share: float, total: int, step_interval: int) -> int:
        """So many; or more where `total` would else not be there in half an interval."""
        wanted = max(in_a_share, total / max(1, step_interval // 2))
        return int(min(max(wanted, self._least), self._most))

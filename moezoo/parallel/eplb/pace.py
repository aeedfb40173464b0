"""How many bytes of experts' weights are sent between two steps of a model."""

import statistics
import time
from collections import deque

SHARE = 0.03
"""The share of a step's time that sending may add to it."""

WIRE = 50e9
"""Assumed bytes per second of a rank until a piece has been timed: a network, not NVLink."""

LEAST, MOST = 1 << 20, 256 << 20
"""Limits for the bytes of a piece; the time of smaller ones is mostly latency."""

LAST_STEPS = 64
"""Number of steps whose median time counts."""


class Pace:
    """Measures how long steps take, by the host's clock, which is only a few steps ahead."""

    def __init__(self, *, least: int = LEAST, most: int = MOST) -> None:
        self._least, self._most = least, most
        self._seconds: deque[float] = deque(maxlen=LAST_STEPS)
        self._last: float | None = None

    def step(self) -> None:
        """Take the time at the end of a step."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def bytes_in_a_share(self, bytes_per_second: float | None) -> float:
        """Return how many bytes are sent in SHARE of a step's time at this rate."""
        step = statistics.median(self._seconds) if self._seconds else 0.0
        return SHARE * step * (bytes_per_second or WIRE)

    def piece_bytes(self, in_a_share: float, total: int, step_interval: int) -> int:
        """Return the bytes of a piece: `in_a_share`, or more where `total` would otherwise take
        longer than half an interval."""
        wanted = max(in_a_share, total / max(1, step_interval // 2))
        return int(min(max(wanted, self._least), self._most))

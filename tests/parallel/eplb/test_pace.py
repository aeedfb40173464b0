import time

import pytest

from moezoo.parallel.eplb.pace import LEAST, MOST, SHARE, WIRE, Pace


def test_a_share_is_of_the_usual_step(monkeypatch):
    pace = Pace()
    assert pace.bytes_in_a_share(1e9) == 0
    # One took long, as where a user thinks between two prompts.
    for now in (0, 4, 8, 1000, 1004, 1008):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: 1e-3 * now)
        pace.step()
    assert pace.bytes_in_a_share(1e9) == pytest.approx(SHARE * 4e6)
    assert pace.bytes_in_a_share(None) == pytest.approx(SHARE * 4e-3 * WIRE)


def test_pieces_arrive_within_half_an_interval():
    pace = Pace()
    assert pace.piece_bytes(3e7, 10**9, 1000) == 30_000_000
    assert pace.piece_bytes(3e7, 10**11, 1000) == 200_000_000
    assert pace.piece_bytes(0, 1, 1) == LEAST
    assert pace.piece_bytes(float("inf"), 1, 1) == MOST

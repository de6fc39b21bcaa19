"""Crowd: a few late answers change nothing, many make room."""

from __future__ import annotations

import pytest
from eclipse.pipeline.download.crowd import FEWEST, FIRST, Crowd


@pytest.mark.parametrize(("late_one_in", "shrinks"), [(50, False), (4, True)])
def test_only_many_late_answers_make_it_smaller(late_one_in: int, shrinks: bool, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    crowd = Crowd(128)
    for number in range(1, 401):
        now[0] += 0.1
        if number % late_one_in:
            crowd.went_well()
        else:
            crowd.was_too_late()
    assert crowd.allowed < FIRST if shrinks else crowd.allowed > FIRST
    assert crowd.allowed >= FEWEST

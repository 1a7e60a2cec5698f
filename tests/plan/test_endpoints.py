"""What an endpoint's history says: how it ended, and when it may be evicted again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import NOW

from reconciler.plan.endpoints import cool_again, cooling_down, describe_exit
from reconciler.plan.ledger import EndpointRecord, Exit

END = Exit("i", NOW, 1, planned=False)
HOUR = 3600.0


def test_an_end_is_told_with_what_the_log_said_or_with_why_it_was_brought_about() -> None:
    assert describe_exit(END) == "exit code 1"
    failed = replace(END, failure="out of memory")
    assert describe_exit(failed) == "exit code 1 (out of memory)"
    assert describe_exit(replace(failed, ended_for="it hung")) == "exit code 1 (ended because it hung)"


def evictable(record: EndpointRecord, after_s: float) -> bool:
    """Whether it may be evicted so many seconds after NOW."""
    return cooling_down(record, NOW.plus(after_s), max_evictions_per_hour=3, min_ready_s=120.0) is None


READY = EndpointRecord("ask", ready_since=NOW)
TIMES = (NOW.wall - 3000.0, NOW.wall - 2000.0, NOW.wall - 1000.0)
HISTORIES = {
    "never evicted": (READY, None),
    "back a moment ago": (replace(READY, evictions=TIMES[:1]), 120.0),
    "still away": (replace(READY, evictions=TIMES[:1], evicted_by="o"), None),
    "not ready since": (replace(READY, evictions=TIMES[:1], ready_since=None), None),
    "as often as may be": (replace(READY, evictions=TIMES), 600.0),
    "more often": (replace(READY, evictions=(NOW.wall - 3500.0, *TIMES)), 600.0),
    "as often, and away": (replace(READY, evictions=TIMES, evicted_by="o"), 600.0),
    "as often, and long ago": (replace(READY, evictions=tuple(t - 2 * HOUR for t in TIMES), evicted_by="o"), None),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_the_moment_at_which_a_cool_down_is_over_is_the_first_at_which_there_is_none(history: str) -> None:
    record, wait = HISTORIES[history]
    end = cool_again(record, NOW, max_evictions_per_hour=3, min_ready_s=120.0)
    assert (end and end.since(NOW)) == wait
    if wait is not None:
        assert not evictable(record, wait - 1.0)
        assert evictable(record, wait)
        assert cool_again(record, NOW.plus(wait), max_evictions_per_hour=3, min_ready_s=120.0) is None

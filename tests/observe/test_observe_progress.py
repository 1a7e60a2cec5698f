"""Whether an engine makes progress: read from its metrics now and then, never guessed from silence."""

from __future__ import annotations

import pytest
from http_box import HttpBox
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.observe.probe import PROGRESS_PACE_S, Answer, Connection, ProbeTarget
from reconciler.observe.prober import next_probe

PAGE = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:iteration_tokens_total_sum{engine="0"} 41.0
"""
TARGET = ProbeTarget(
    incarnation="one", port=0, health_path="/health", busy_metrics=("vllm:num_requests_running",), interval_s=5.0,
    timeout_s=5.0, failures=3, starting=False, running_metrics=("vllm:num_requests_running",),
    progress_metrics=("vllm:iteration_tokens_total_sum",),
)  # fmt: skip
BEGIN = Instant(1_700_000_000.0, 1000.0)


@pytest.fixture
def box():
    box = HttpBox().start()
    yield box
    box.stop()


def hung(*answers: Answer, pace: float = 15.0) -> float:
    probe = None
    for number, answer in enumerate(answers):
        probe = next_probe(probe, TARGET, answer, BEGIN.plus(number * pace))
    return probe.frozen_s


def working(running: int, progress: int, **fields: object) -> Answer:
    return replace(Answer(ready=True, running=running, progress=progress), **fields)


def test_the_counters_are_read_with_the_first_question_and_then_at_their_own_pace(box, clock):
    box.answers["/metrics"] = (200, PAGE)
    connection = Connection(replace(TARGET, port=box.port), clock)
    first, second = (connection.ask(replace(TARGET, port=box.port)) for _ in range(2))
    connection.close()
    assert (first.running, first.progress, first.busy) == (2, 41, None)
    assert (second.running, second.progress) == (None, None)
    assert box.asked.count("/metrics") == 1
    assert PROGRESS_PACE_S < 120


def test_one_that_is_not_ready_yet_is_not_asked_for_its_counters(box, clock):
    box.answers["/metrics"] = (200, PAGE)
    connection = Connection(replace(TARGET, port=box.port, starting=True), clock)
    assert connection.ask(replace(TARGET, port=box.port, starting=True)).progress is None
    connection.close()


def test_a_counter_that_stands_still_with_requests_running_is_frozen_since_it_was_first_seen_there():
    assert hung(*[working(2, 41)] * 9) == 120.0


def test_any_movement_an_idle_moment_or_sleep_begins_anew():
    still = [working(2, 41)] * 8
    assert hung(*still, working(2, 42)) == 0.0
    assert hung(*still, working(0, 41)) == 0.0
    assert hung(*still, working(2, 41, sleeping=True)) == 0.0
    assert hung(*still, working(2, 42), working(2, 42)) == 15.0


def test_time_without_requests_is_not_counted():
    idle = [working(0, 41)] * 100
    assert hung(*idle, working(1, 41)) == 0.0
    assert hung(*idle, working(1, 41), working(1, 41)) == 15.0
    assert hung(working(1, 41), *idle, working(1, 41), working(1, 41)) == 15.0


def test_silence_adds_nothing():
    silent = [Answer(ready=False, detail="timeout")] * 100
    assert hung(*[working(2, 41)] * 3, *silent) == 30.0
    assert hung(*silent) == 0.0


@pytest.mark.parametrize(
    ("load", "at_work"),
    [
        (b'{"server_load": 3}', 3),
        (b'{"server_load": 0}', 0),
        (b'{"server_load": "x"}', 0),
        (b"[]", 0),
        (b"not JSON", 0),
        (None, 0),
    ],
)
def test_where_the_engine_shows_nothing_at_work_its_server_is_asked(box, clock, load, at_work):
    """An engine that stood still before the requests came was never told of them."""
    box.answers["/metrics"] = (200, PAGE.replace(b'running{engine="0"} 2.0', b'running{engine="0"} 0.0'))
    if load is not None:
        box.answers["/load"] = (200, load)
    target = replace(TARGET, port=box.port, load_path="/load")
    connection = Connection(target, clock)
    assert connection.ask(target).running == at_work
    connection.close()


def test_a_server_is_not_asked_for_what_its_engine_tells(box, clock):
    box.answers["/metrics"] = (200, PAGE)
    target = replace(TARGET, port=box.port, load_path="/load")
    connection = Connection(target, clock)
    assert connection.ask(target).running == 2
    connection.close()
    assert "/load" not in box.asked

"""Asking again and again: pace, what is kept, and when somebody is told."""

from __future__ import annotations

import itertools
import socket
import threading
import time

import pytest
from http_box import HttpBox
from msgspec.structs import replace
from ports import free_port
from test_observe_probe import PAGE, target

from reconciler.clock import Instant
from reconciler.observe.probe import Answer
from reconciler.observe.prober import IDLE_WORKERS, Prober, is_material, next_probe


@pytest.fixture
def box():
    box = HttpBox().start()
    yield box
    box.stop()


class Changes:
    """Counts what the prober says."""

    def __init__(self):
        self.count = 0
        self.event = threading.Event()

    def __call__(self):
        self.count += 1
        self.event.set()


@pytest.fixture
def changes():
    return Changes()


@pytest.fixture
def prober(clock, changes):
    prober = Prober(clock, changes)
    yield prober
    prober.close()


def test_a_new_target_is_asked_at_once_and_then_at_its_interval(prober, box, changes, wait_until):
    prober.watch({"one": target(box.port, interval_s=0.1)})
    wait_until(lambda: prober.results().get("one"), "a first answer")
    assert prober.results()["one"].ready is True
    wait_until(lambda: len(box.asked) >= 6, "asked again")
    assert changes.count == 1  # the first answer was news, the same one again is not
    assert box.connections == 1


def test_the_interval_of_a_ready_endpoint_is_kept(prober, box, wait_until):
    prober.watch({"one": target(box.port, interval_s=3600.0)})
    wait_until(prober.results, "a first answer")
    for _ in range(20):
        prober.watch({"one": target(box.port, interval_s=3600.0)})
    time.sleep(0.3)  # nothing may happen in this time
    assert len(box.asked) == 1


def test_asking_now_does_not_wait_for_the_interval(prober, box, wait_until):
    prober.watch({"one": target(box.port, interval_s=3600.0)})
    wait_until(lambda: len(box.asked) == 1, "the first question")
    wait_until(prober.results, "its answer")
    prober.probe_now(["one", "nobody"])
    wait_until(lambda: len(box.asked) == 2, "the second question")


def test_a_starting_endpoint_is_seen_ready_soon_after_it_listens(prober, changes, wait_until):
    with socket.socket() as reserved:
        port = free_port()
        reserved.bind(("127.0.0.1", port))
        prober.watch({"one": target(port, starting=True, interval_s=3600.0)})
        wait_until(prober.results, "a refusal")
        assert prober.results()["one"].ready is False
        time.sleep(0.3)  # so that the pace has had time to fall
    late = HttpBox().start(port)
    wait_until(lambda: prober.results()["one"].ready, "ready, long before an interval of an hour is over")
    probe = prober.results()["one"]
    assert probe.misses == 0
    assert probe.failing_since is None
    assert probe.ready_since is not None
    late.stop()


def test_what_is_not_watched_any_more_is_not_asked_any_more(prober, box, wait_until):
    prober.watch({"one": target(box.port, interval_s=0.02)})
    wait_until(lambda: len(box.asked) > 3, "some questions")
    prober.watch({})
    assert prober.results() == {}
    wait_until(lambda: prober._idle == prober._workers, "a question that was out is answered")
    asked = len(box.asked)
    time.sleep(0.2)
    assert len(box.asked) == asked


def test_endpoints_that_hang_do_not_delay_the_others(prober, box, wait_until):
    box.answers["/slow"] = box.hang
    targets = {
        f"hangs-{i}": target(box.port, incarnation=f"hangs-{i}", health_path="/slow", timeout_s=20.0) for i in range(8)
    }
    prober.watch(targets | {"well": target(box.port, incarnation="well")})
    wait_until(lambda: box.asked.count("/health") > 10, "the healthy one is asked all the while")
    assert box.asked.count("/slow") == 8  # nobody is asked by two at once
    assert prober.results()["well"].ready


def test_misses_are_counted_and_told_when_they_reach_the_limit(prober, box, changes, wait_until):
    prober.watch({"one": target(box.port, interval_s=0.03, failures=3)})
    wait_until(prober.results, "ready")
    ready_since = prober.results()["one"].ready_since
    box.answers["/health"] = (503, b"")
    wait_until(lambda: prober.results()["one"].misses >= 5, "misses")
    wait_until(lambda: changes.count >= 3, "somebody is told")
    assert changes.count == 3, "of the first ready, the first miss and the third; the fifth is no news"
    probe = prober.results()["one"]
    assert probe.ready is False
    assert probe.ready_since is None
    assert probe.failing_since.mono > ready_since.mono
    box.answers["/health"] = (200, b"")
    wait_until(lambda: prober.results()["one"].ready, "ready again")
    assert prober.results()["one"].misses == 0
    assert prober.results()["one"].ready_since.mono > probe.failing_since.mono


def test_while_draining_an_answer_without_a_count_is_not_shown(prober, box, changes, wait_until):
    """A drain ends when nothing is in flight, or there is no figure: an old answer must not look like that."""
    box.answers["/metrics"] = (503, b"")
    idle = target(box.port, interval_s=0.05)
    prober.watch({"one": idle})
    wait_until(prober.results, "ready")
    prober.watch({"one": replace(idle, busy=True)})
    assert prober.results() == {}
    wait_until(lambda: box.asked.count("/metrics") >= 2, "the count is asked for")
    assert prober.results() == {}
    box.answers["/metrics"] = (200, PAGE)
    wait_until(prober.results, "the count is there")
    assert prober.results()["one"].busy == 7
    told = changes.count
    box.answers["/metrics"] = (200, PAGE.replace(b" 2.0", b" 0.0").replace(b" 1.0", b" 0.0").replace(b" 4.0", b" 0.0"))
    wait_until(lambda: prober.results()["one"].busy == 0, "nothing in flight")
    wait_until(lambda: changes.count > told, "somebody is told")


def test_a_listener_that_is_not_its_own_never_makes_it_ready(box, clock, changes, wait_until):
    own = threading.Event()
    prober = Prober(clock, changes, owns=lambda _incarnation, _port: own.is_set())
    prober.watch({"one": target(box.port, starting=True)})
    wait_until(lambda: len(box.asked) > 3, "asked")
    assert prober.results()["one"].ready is False
    own.set()
    wait_until(lambda: prober.results()["one"].ready, "ready once the listener is its own")
    prober.close()


def test_a_check_that_breaks_is_not_an_answer_and_does_not_end_the_asking(box, clock, changes, wait_until):
    def broken(_incarnation, _port):
        raise RuntimeError("defect")

    prober = Prober(clock, changes, owns=broken)
    prober.watch({"one": target(box.port, interval_s=0.02)})
    wait_until(lambda: len(box.asked) > 3, "asked all the same")
    assert prober.results()["one"].ready is None
    assert prober.results()["one"].misses == 0
    prober.close()


def test_closing_ends_the_threads(box, clock, changes, wait_until):
    before = threading.active_count()
    prober = Prober(clock, changes)
    prober.watch({f"{i}": target(box.port, incarnation=f"{i}", interval_s=0.02) for i in range(5)})
    wait_until(lambda: len(prober.results()) == 5, "all asked")
    prober.close()
    mine = ("prober", "probe")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name in mine], "no thread of its own is left")
    assert threading.active_count() <= before + 5  # those of the server's connections, which end by themselves


def test_two_threads_ask_all_that_are_due_at_once_where_nobody_hangs(box, clock, changes, wait_until, monkeypatch):
    monkeypatch.setattr("reconciler.observe.prober.PATIENCE_S", 3600.0)  # on a busy box an answer takes its time
    begun, begin = [], Prober._begin_worker
    monkeypatch.setattr(Prober, "_begin_worker", lambda prober: (begun.append(prober), begin(prober)))
    prober = Prober(clock, changes)
    prober.watch({f"{i}": target(box.port, incarnation=f"{i}", interval_s=3600.0) for i in range(20)})
    wait_until(lambda: len(prober.results()) == 20, "all asked")
    assert len(begun) == IDLE_WORKERS
    prober.close()


def test_threads_that_were_needed_once_are_not_kept(box, prober, wait_until):
    box.answers["/slow"] = box.hang
    slow = {f"{i}": target(box.port, incarnation=f"{i}", health_path="/slow", interval_s=3600.0) for i in range(8)}
    prober.watch(slow)
    wait_until(lambda: box.asked.count("/slow") == 8, "all are asked at once")
    assert prober._workers == 8
    box.released.set()
    wait_until(lambda: prober._workers == IDLE_WORKERS, "most of the threads ended")
    prober.watch({**slow, "one": target(box.port, incarnation="one")})
    wait_until(lambda: "one" in prober.results(), "those that are left go on asking")


# ---------------------------------------------------------------- pure parts

READY, MISS, UNASKED = Answer(ready=True), Answer(ready=False, detail="503"), Answer(ready=None, counted=False)


def history(*answers, failures=3):
    probe = None
    for second, answer in enumerate(answers):
        probe = next_probe(probe, target(1, failures=failures), answer, Instant(1000.0 + second, float(second)))
    return probe


def test_one_slow_answer_is_no_end_of_readiness():
    probe = history(READY, READY, MISS, MISS)
    assert (probe.ready, probe.misses, probe.ready_since.mono, probe.failing_since.mono) == (False, 2, 0.0, 2.0)
    probe = history(READY, READY, MISS, MISS, READY)
    assert (probe.ready, probe.misses, probe.ready_since.mono, probe.failing_since) == (True, 0, 0.0, None)


def test_readiness_after_too_many_misses_is_a_new_one():
    assert history(READY, MISS, MISS, MISS).ready_since is None
    assert history(READY, MISS, MISS, MISS, READY).ready_since.mono == 4.0


def test_a_question_that_could_not_be_put_changes_no_count():
    before, after = history(READY, MISS), history(READY, MISS, UNASKED)
    assert after.ready is None
    assert (after.misses, after.failing_since, after.ready_since) == (
        before.misses, before.failing_since, before.ready_since,
    )  # fmt: skip


def test_who_slept_and_does_not_say_still_sleeps():
    asleep = Answer(ready=True, sleeping=True)
    assert history(asleep, READY, MISS).sleeping is True
    assert history(asleep, Answer(ready=True, sleeping=False)).sleeping is False
    assert history(asleep, READY).sleeping_at == Instant(1000.0, 0.0), "what it did not say again is as old as it was"
    assert history(asleep, READY, asleep).sleeping_at == Instant(1002.0, 2.0)


def test_only_what_somebody_should_look_at_is_material():
    ready, miss = history(READY), history(READY, MISS)
    asked = target(1, failures=3, hung_s=120.0)
    assert is_material(None, ready, asked)
    assert not is_material(ready, history(READY, READY), asked)
    assert is_material(ready, miss, asked)
    assert not is_material(miss, history(READY, MISS, MISS), asked)
    assert is_material(history(READY, MISS, MISS), history(READY, MISS, MISS, MISS), asked)
    assert is_material(replace(ready, busy=2), replace(ready, busy=0), asked)
    assert not is_material(replace(ready, busy=0), replace(ready, busy=0), asked)
    assert not is_material(replace(ready, busy=0), replace(ready, busy=5), asked)
    assert is_material(ready, replace(ready, sleeping=True), asked)
    frozen = [
        replace(ready, moved=ready.at, progress_at=ready.at.plus(seconds)) for seconds in (60.0, 119.0, 120.0, 135.0)
    ]
    assert [is_material(*pair, asked) for pair in itertools.pairwise(frozen)] == [False, True, False]
    assert is_material(frozen[3], replace(ready, moved=ready.at, progress_at=ready.at), asked), "it goes on"

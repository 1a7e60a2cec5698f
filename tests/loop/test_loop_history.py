"""Predictions from what was measured."""

from __future__ import annotations

import itertools

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.loop.history import Learner, predicted, record_durations, usual_runs
from reconciler.plan.ledger import EndpointRecord, Exit, Ledger, Nap
from reconciler.plan.observed import Incarnation, Observed, StopProgress, Subject
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import Spec

SETPOINTS = """\
version: 1
endpoints:
  ask: {model: m, gpus: 1, port: 8001, stop: {drain: 5s, grace: 2s}, health: {startup: 40s}}
  other: {model: m, gpus: 1, port: 8002}
"""


def read() -> Spec:
    return resolve(SourceText("setpoints.yaml", SETPOINTS), [], hostname="box", read_env_file=lambda _: b"")


def test_a_prediction_is_the_95th_percentile_of_what_was_measured() -> None:
    found = predicted({("ask", "load"): [float(n) for n in range(1, 41)]}, read())
    assert found["ask"].load_s == 38.0


def test_what_was_not_measured_is_the_engines_default_within_the_endpoints_bounds() -> None:
    found = predicted({("ask", "stop"): [1.0]}, read())
    assert found["ask"].load_s == 40.0
    assert found["ask"].drain_s == 5.0
    assert found["ask"].stop_s == 1.0
    assert "other" not in found


def test_an_edit_that_shortens_the_drain_bounds_what_was_measured_before_it() -> None:
    assert predicted({("ask", "drain"): [30.0]}, read())["ask"].drain_s == 5.0


def test_naps_are_predicted_by_level_from_those_that_were_measured() -> None:
    measured = {("ask", "sleep1"): [4.0, 5.0], ("ask", "wake1"): [0.3, 0.2], ("ask", "wake2"): [9.0]}
    found = predicted(measured, read())["ask"]  # type: ignore[arg-type]
    assert (found.sleep_s, found.wake_s) == ({1: 5.0}, {1: 0.3, 2: 9.0})


class Recorder:
    """A journal that remembers what was measured."""

    def __init__(self) -> None:
        self.measured: list[tuple[str, str, float]] = []

    def record_timing(self, subject: str, what: str, seconds: float) -> None:
        self.measured.append((subject, what, seconds))


def at(second: float) -> Instant:
    return Instant(1_000_000 + second, second)


def napping(nap: Nap | None, ready: Instant | None = None) -> Ledger:
    record = EndpointRecord("ask", nap=nap, ready_incarnation="ask-1", ready_since=ready or at(-500))
    return Ledger(endpoints={"ask": record})


def steps(*ledgers: Ledger, since: float = -1.0) -> list[tuple[str, str, float]]:
    journal = Recorder()
    for before, after in itertools.pairwise(ledgers):
        record_durations(journal, before, after, OBSERVED, at(since))  # type: ignore[arg-type]
    return journal.measured


OBSERVED = Observed("boot", at(0), (), gpus_known=True, incarnations=(), probes={}, ports={}, clock_jumped=False)
BEGUN = Nap("ask-1", 2, at(0), begun=at(2))
SLEPT = replace(BEGUN, slept=at(5))
WAKING = replace(SLEPT, waking=at(70))
WOKEN = replace(WAKING, woken=at(78))


def test_each_step_of_a_nap_is_measured_once_from_the_call_to_what_it_brought() -> None:
    ledgers = [napping(n) for n in (None, BEGUN, BEGUN, SLEPT, SLEPT, WAKING, WOKEN)]
    assert steps(*ledgers, napping(None, at(79)), napping(None, at(79))) == [
        ("ask", "sleep2", 3.0),
        ("ask", "wake2", 9.0),
    ]
    assert steps(napping(WAKING), napping(None, at(79))) == [("ask", "wake2", 9.0)], "both answers within one look"


def test_a_step_that_failed_or_waited_for_a_daemon_teaches_nothing() -> None:
    assert steps(napping(BEGUN), napping(replace(BEGUN, failed="no"))) == []
    assert steps(napping(replace(WOKEN, failed="no")), napping(None, at(79))) == []
    assert steps(napping(BEGUN), napping(SLEPT), since=3.0) == []
    assert steps(napping(WOKEN), napping(None, at(79)), since=71.0) == []
    other = EndpointRecord("ask", ready_incarnation="ask-2", ready_since=at(90))
    assert steps(napping(WOKEN), Ledger(endpoints={"ask": other})) == [], "it was started afresh"


def test_how_long_work_usually_runs_is_the_95th_percentile_of_its_runs() -> None:
    runs = [float(n) for n in range(1, 41)]
    assert usual_runs({("render", "run"): runs, ("ask", "load"): [3.0]}) == {"render": 38.0}


def test_endpoints_and_work_that_the_files_no_longer_know_are_left_out() -> None:
    assert predicted({("gone", "load"): [3.0], ("render", "run"): [300.0]}, read()) == {}


def test_the_return_of_memory_is_measured_where_it_was_waited_for_and_predicted_from_that() -> None:
    ended = Incarnation(
        id="ask-1", subject=Subject("endpoint", "ask"), process_hash="x", gpus=("GPU-0",), memory_bytes=(1,),
        exclusive=True, port=8001, started=at(0), phase="exited", pid=None, strays=(), exit_code=0, exited=at(10),
    )  # fmt: skip
    seen = replace(OBSERVED, at=at(14), incarnations=(ended,))
    for since, measured in ((0.0, [("ask", "memory", 4.0)]), (12.0, [])):
        journal = Recorder()
        record_durations(journal, Ledger(), Ledger(), seen, at(since), (ended.id,))  # type: ignore[arg-type]
        assert journal.measured == measured
    found = predicted({("ask", "memory"): [4.0, 3.0]}, read())
    assert found["ask"].memory_s == 4.0


@pytest.mark.parametrize(("bygone", "measured"), [(False, [("ask", "drain", 2.0), ("ask", "stop", 3.0)]), (True, [])])
def test_a_stop_is_measured_from_its_signal_unless_the_box_went_down_meanwhile(bygone: bool, measured: object) -> None:
    ended = Incarnation(
        id="ask-1", subject=Subject("endpoint", "ask"), process_hash="x", gpus=(), memory_bytes=(), exclusive=True,
        port=8001, started=at(0), phase="exited", pid=None, strays=(), exit_code=0, exited=at(15),
        stop=StopProgress(at(10), drained=True, signalled=at(12)), bygone=bygone,
    )  # fmt: skip
    after = Ledger(endpoints={"ask": EndpointRecord("ask", exits=(Exit("ask-1", at(15), 0, planned=True),))})
    journal = Recorder()
    record_durations(journal, Ledger(), after, replace(OBSERVED, incarnations=(ended,)), at(0))  # type: ignore[arg-type]
    assert journal.measured == measured


def test_a_load_that_nobody_followed_from_its_start_teaches_nothing() -> None:
    """It may have been ready long before a daemon came and saw it."""
    started = Incarnation(
        id="ask-1", subject=Subject("endpoint", "ask"), process_hash="x", gpus=(), memory_bytes=(), exclusive=False,
        port=8001, started=at(10), phase="running", pid=7, strays=(), exit_code=None, exited=None,
    )  # fmt: skip
    ready = Ledger(endpoints={"ask": EndpointRecord("ask", ready_incarnation="ask-1", ready_since=at(600))})
    seen = replace(OBSERVED, at=at(600), incarnations=(started,))
    for since, measured in ((9.0, [("ask", "load", 590.0)]), (599.0, [])):
        journal = Recorder()
        record_durations(journal, Ledger(), ready, seen, at(since))  # type: ignore[arg-type]
        assert journal.measured == measured


def test_an_endpoint_that_an_overlay_alone_knows_is_learnt_of_as_well() -> None:
    text = """\
version: 1
makespan: {duration: 1h}
set:
  guest: {model: m, gpus: 1, port: 8009}
"""
    files = resolve(
        SourceText("setpoints.yaml", SETPOINTS), [SourceText("overlays/evening.yaml", text)], hostname="box",
        read_env_file=lambda _: b"",
    )  # fmt: skip
    assert predicted({("guest", "load"): [7.0]}, files)["guest"].load_s == 7.0


def test_what_is_learnt_again_follows_each_new_measurement_and_each_edit_and_nothing_else() -> None:
    learner, spec, ledger = Learner(), read(), Ledger(endpoints={"ask": EndpointRecord("ask")})
    measured = {("ask", "load"): [7.0], ("job", "run"): [9.0]}
    first = learner.learn(ledger, measured, spec)  # type: ignore[arg-type]
    assert (first.timings["ask"].load_s, first.runs, first.endpoints) == (7.0, {"job": 9.0}, ledger.endpoints)
    again = learner.learn(Ledger(), measured, spec)  # type: ignore[arg-type]
    assert again.timings is first.timings
    assert again.endpoints == {}, "the ledger is that of now"
    more = {**measured, ("ask", "load"): [8.0]}
    assert learner.learn(ledger, more, spec).timings["ask"].load_s == 8.0  # type: ignore[arg-type]
    edited = replace(spec, endpoints={})
    assert learner.learn(ledger, more, edited).timings == {}  # type: ignore[arg-type]

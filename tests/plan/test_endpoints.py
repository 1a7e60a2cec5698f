"""What an endpoint's history says: how it ended, and when it may be evicted again."""

from __future__ import annotations

import pytest
from builders import NOW, endpoint, gpu, incarnation, observed, ready, spec, uuid
from msgspec.structs import replace

from reconciler.plan.board import Hold, Tenant
from reconciler.plan.endpoints import (
    IN_THE_BACKGROUND,
    JITTER,
    Standing,
    as_tenant,
    cool_again,
    cooling_down,
    describe_exit,
    earliest_restart,
    forgiven,
    holds_of,
    stand,
)
from reconciler.plan.ledger import EndpointRecord, Exit, Ledger, Nap, Timings
from reconciler.plan.observed import Incarnation, Probe, StopProgress
from reconciler.plan.situation import Situation
from reconciler.spec.spec import Health, Restart
from reconciler.units import GIB

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


# ---------------------------------------------------------------- what it is judged to be

ASK = endpoint("ask", [0], health=Health(failures=3, startup_s=600.0, unhealthy_for_s=60.0))
RUNS = incarnation(ASK, [0], started=NOW.plus(-300))
ANSWERS = ready(RUNS)
WAS_READY = EndpointRecord("ask", ready_incarnation=RUNS.id, ready_since=NOW.plus(-200))
DOZES = replace(WAS_READY, nap=Nap(RUNS.id, 1, NOW.plus(-20), begun=NOW.plus(-10)))


def missed(times: int) -> Probe:
    return replace(ANSWERS, ready=False, misses=times, failing_since=NOW.plus(-5), detail="503")


def stands(record: EndpointRecord, probe: Probe | None, runs: Incarnation = RUNS) -> Standing:
    """What one look makes of an endpoint with this history and this answer."""
    seen = replace(observed(gpu(0), incarnations=[runs]), probes={} if probe is None else {runs.id: probe})
    return stand(Situation(spec(ASK), seen, Ledger("boot", endpoints={"ask": record}), NOW), "ask", ASK)


STATES = {
    "it answers": (WAS_READY, ANSWERS, "healthy"),
    "not asked yet": (WAS_READY, None, "healthy"),
    "missed less often than counts": (WAS_READY, missed(2), "healthy"),
    "missed as often as counts": (WAS_READY, missed(3), "unhealthy"),
    "was never ready": (EndpointRecord("ask"), missed(1), "starting"),
    "was never ready, and not asked": (EndpointRecord("ask"), None, "starting"),
    "told to sleep": (DOZES, ANSWERS, "sleeping"),
    "told to sleep, and not asked": (DOZES, None, "sleeping"),
    "told to sleep, and missed less often than counts": (DOZES, missed(2), "sleeping"),
    "told to sleep, and missed as often as counts": (DOZES, missed(3), "unhealthy"),
}


@pytest.mark.parametrize("case", STATES)
def test_one_that_runs_is_judged_by_its_answers_and_by_what_it_was_told(case: str) -> None:
    record, probe, state = STATES[case]
    found = stands(record, probe)
    assert (found.name, found.state, found.current) == ("ask", state, RUNS)
    assert found.reason == {"unhealthy": "503", "starting": "503" if probe else ""}.get(state, "")


@pytest.mark.parametrize(("after_s", "state"), [(599.0, "starting"), (600.0, "unhealthy")])
def test_one_that_was_never_ready_has_until_its_startup_deadline_and_is_then_started_afresh(
    after_s: float, state: str
) -> None:
    found = stands(EndpointRecord("ask"), missed(1), replace(RUNS, started=NOW.plus(-after_s)))
    assert found.state == state
    assert found.must_restart == (None if state == "starting" else "not ready within 600 s")
    assert found.wake == (NOW.plus(1.0) if state == "starting" else None)


@pytest.mark.parametrize("record", [WAS_READY, DOZES], ids=["healthy", "sleeping"])
def test_once_it_is_well_nothing_is_left_of_how_long_it_was_not_nor_of_why_it_was_to_end(
    record: EndpointRecord,
) -> None:
    well = stands(replace(record, unhealthy_since=NOW.plus(-59), ending="it hung"), ANSWERS).record
    assert (well.unhealthy_since, well.ending) == (None, None)


@pytest.mark.parametrize(("for_s", "restart"), [(59.0, None), (60.0, "unhealthy for 60 s: 503")])
def test_one_that_is_unwell_is_started_afresh_after_as_long_as_its_file_says(for_s: float, restart: str | None) -> None:
    found = stands(replace(WAS_READY, unhealthy_since=NOW.plus(-for_s)), missed(9))
    assert (found.must_restart, found.wake) == (restart, NOW.plus(1.0) if restart is None else None)
    assert stands(WAS_READY, missed(9)).record.unhealthy_since == NOW


@pytest.mark.parametrize(("after_s", "streak"), [(99.0, 4), (100.0, 0)])
def test_ends_of_the_past_are_forgiven_once_it_was_ready_for_as_long_as_its_file_says(
    after_s: float, streak: int
) -> None:
    brief = replace(ASK, restart=Restart(reset_after_s=100.0))
    record = replace(WAS_READY, ready_since=NOW.plus(-after_s), streak=4)
    seen = observed(gpu(0), incarnations=[RUNS])
    situation = Situation(spec(brief), seen, Ledger("boot", endpoints={"ask": record}), NOW)
    assert stand(situation, "ask", brief).record.streak == streak
    assert stand(situation, "ask", None).record.streak == 4, "nobody says how long any more"


# ---------------------------------------------------------------- what it holds and what it costs that it leaves

TAKES = Ledger("boot", timings={"ask": Timings(load_s=40.0, drain_s=5.0, stop_s=2.0, memory_s=3.0)})


@pytest.mark.parametrize(("offers", "ready", "lost_ms"), [
    ((), True, 47_000), (("a",), True, 47_000), (("a", "b"), True, 94_000), (("a", "b"), False, 0),
])  # fmt: skip
def test_who_is_ready_loses_its_way_out_and_back_for_each_that_it_offers(
    offers: tuple[str, ...], ready: bool, lost_ms: int
) -> None:
    item = replace(ASK, capabilities=offers, priority=70)
    situation = Situation(spec(item), observed(gpu(0), incarnations=[RUNS]), TAKES, NOW)
    found = as_tenant(situation, RUNS, item, ready=ready)
    assert found == Tenant("endpoint/ask", 70, holds_of(RUNS), lost_ms, 10_000, offers, 0, None)
    for preemptible in (True, False):
        calm = replace(item, preemptible=preemptible)
        assert as_tenant(situation, RUNS, calm, ready=ready, calm=True) == replace(found, preemptible=preemptible)


def test_what_one_holds_is_known_for_each_of_its_gpus_or_not_at_all() -> None:
    two = incarnation(endpoint("two", [0, 1], memory=30), [0, 1])
    assert holds_of(two) == {uuid(0): Hold(30 * GIB, exclusive=False), uuid(1): Hold(30 * GIB, exclusive=False)}
    with pytest.raises(ValueError, match="shorter"):
        holds_of(replace(two, memory_bytes=(30 * GIB,)))


# ---------------------------------------------------------------- how its ends are counted

ENDED = replace(RUNS, phase="exited", exit_code=3, exited=NOW.plus(-1), failure="out of memory")
ASKED = StopProgress(NOW.plus(-9), drained=True, signalled=NOW.plus(-8))
LASTED = replace(WAS_READY, ready_since=NOW.plus(-1 - Restart().reset_after_s), streak=4)
COUNTED = {
    "by itself": (replace(WAS_READY, streak=4), ENDED, False, 5),
    "by itself, after it had been ready for long enough": (LASTED, ENDED, False, 1),
    "by itself, a moment too soon for that": (
        replace(LASTED, ready_since=NOW.plus(-Restart().reset_after_s)), ENDED, False, 5,
    ),
    "by itself, and was never ready": (replace(LASTED, ready_incarnation=None), ENDED, False, 5),
    "as it was asked to": (replace(WAS_READY, streak=4), replace(ENDED, stop=ASKED), True, 4),
    "as it was asked to, because it was unwell": (
        replace(WAS_READY, streak=4, unhealthy_since=NOW.plus(-70), ending="it hung"), replace(ENDED, stop=ASKED),
        False, 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", COUNTED)
def test_it_ended(how: str) -> None:
    record, ended, planned, streak = COUNTED[how]
    after = stands(record, None, ended).record
    why = record.ending if ended.stop else None
    failure = None if planned else "out of memory"
    assert after.exits == (Exit(RUNS.id, NOW.plus(-1), 3, planned, failure, why),)
    assert after.streak == streak
    assert (after.ready_since, after.unhealthy_since, after.ending) == (None, None, None)
    assert stands(after, None, ended).record == after, "each end is counted once"


@pytest.mark.parametrize(("before", "failed"), [(4, False), (5, True)])
def test_one_that_ends_by_itself_too_often_within_its_window_is_given_up_until_its_file_is_another(
    before: int, failed: bool
) -> None:
    past = tuple(Exit(f"old-{i}", NOW.plus(-10 - i), 1, planned=False) for i in range(before))
    asked = Exit("asked", NOW.plus(-5), 0, planned=True)
    long_ago = Exit("ancient", NOW.plus(-2 - Restart().window_s), 1, planned=False)
    record = replace(WAS_READY, exits=(long_ago, *past, asked))
    after = stands(record, None, ENDED).record
    words = "6 ends within 600 s; the last with exit code 3 (out of memory)" if failed else None
    assert (after.failed, after.failed_hash) == (words, ASK.process_hash if failed else None)
    if failed:
        edited = replace(after, failed_hash="another")
        assert stands(edited, None, ENDED).record.failed is None
        assert all(e.planned for e in stands(edited, None, ENDED).record.exits), "and none is counted again"


def test_evictions_of_more_than_an_hour_ago_are_forgotten() -> None:
    times = (NOW.wall - 3600.0, NOW.wall - 3599.0, NOW.wall - 1.0)
    assert stands(replace(WAS_READY, evictions=times), ANSWERS).record.evictions == times[1:]


# ---------------------------------------------------------------- where it cannot be asked

ELSEWHERE = {
    "its process could not be verified": (replace(RUNS, phase="unknown"), "unknown"),
    "it was killed and does not end: the kernel waits for something": (replace(RUNS, undying_since=NOW), "stopping"),
    "its leader is gone; processes it left behind still run": (replace(ENDED, strays=(4711,)), "stopping"),
    "": (replace(RUNS, stop=ASKED), "stopping"),
}


@pytest.mark.parametrize("words", ELSEWHERE)
def test_what_its_process_does_comes_before_what_it_answers(words: str) -> None:
    runs, state = ELSEWHERE[words]
    found = stands(WAS_READY, ANSWERS, runs)
    assert (found.state, found.reason, found.must_restart, found.wake) == (state, words, None, None)


def test_one_whose_strays_cannot_be_told_or_that_vanished_with_some_left_is_not_there_for_anybody() -> None:
    assert stands(WAS_READY, ANSWERS, replace(RUNS, strays=None)).state == "unknown"
    assert stands(WAS_READY, ANSWERS, replace(ENDED, phase="vanished", strays=(4711,))).state == "stopping"


def test_where_nothing_runs_it_is_stopped_or_failed_with_what_it_failed_by() -> None:
    quiet = replace(WAS_READY, exits=(Exit(RUNS.id, NOW.plus(-1), 3, planned=False),))
    assert (stands(quiet, None, ENDED).state, stands(quiet, None, ENDED).reason) == ("stopped", "")
    failed = replace(quiet, failed="6 ends", failed_hash=ASK.process_hash)
    assert (stands(failed, None, ENDED).state, stands(failed, None, ENDED).reason) == ("failed", "6 ends")


def test_one_that_went_into_the_background_is_told_to_stay_in_the_foreground() -> None:
    left = replace(ENDED, exit_code=0, strays=(4711,), failure=None)

    def said(record: EndpointRecord, ended: Incarnation) -> str | None:
        return stands(record, None, ended).record.exits[-1].failure

    assert said(EndpointRecord("ask"), left) == IN_THE_BACKGROUND
    assert said(WAS_READY, left) is None, "its engine may live on"
    assert said(EndpointRecord("ask"), replace(left, exit_code=1)) is None
    assert said(EndpointRecord("ask"), replace(left, strays=())) is None
    assert said(EndpointRecord("ask"), replace(left, failure="BadArgument")) == "BadArgument"
    assert said(EndpointRecord("ask"), replace(left, stop=ASKED)) is None, "it was to end"


def test_one_without_a_port_is_ready_as_soon_as_it_runs() -> None:
    portless = replace(RUNS, port=None)
    record = stands(EndpointRecord("ask"), None, portless).record
    assert (record.ready_incarnation, record.ready_since, record.last_gpus) == (RUNS.id, NOW, RUNS.gpus)
    assert stands(EndpointRecord("ask"), None).record.ready_incarnation is None, "one with a port is asked"
    leaves = replace(ENDED, port=None, strays=(4711,))
    assert stands(replace(EndpointRecord("ask"), exits=(END,)), None, leaves).record.ready_incarnation is None


def test_who_is_forgiven_has_no_failures_and_no_streak_and_none_of_its_ends_counts() -> None:
    ends = (replace(END, ended_for="it hung"), END)
    record = replace(WAS_READY, failed="6 ends", failed_hash="h", streak=5, exits=ends)
    planned = replace(END, planned=True)
    assert forgiven(record) == replace(WAS_READY, exits=(planned, planned))


def test_a_cool_down_is_told_in_words() -> None:
    def words(record: EndpointRecord, after_s: float = 0.0) -> str | None:
        return cooling_down(record, NOW.plus(after_s), max_evictions_per_hour=3, min_ready_s=120.0)

    assert words(replace(READY, evictions=TIMES)) == "was evicted 3 times within the hour (at most 3)"
    back = replace(READY, evictions=TIMES[:1])
    assert words(back, 50.0) == "has been ready for less than 2m since it was last evicted"
    assert words(back, -1.0) == "has been ready for less than 2m since it was last evicted"
    assert words(replace(back, ready_since=None)) == "has been ready for less than 2m since it was last evicted"
    assert words(READY) is None, "it was never evicted"


def test_restarts_wait_longer_with_each_failure_by_a_spread_of_the_ended_one_alone() -> None:
    restart = Restart(initial_s=2.0, max_s=20.0)
    ends = (replace(END, at=NOW.plus(-100)), END, replace(END, planned=True, at=NOW.plus(9)))
    waits = []
    for streak in (1, 2, 3, 4, 5, 6, 7):
        again = earliest_restart(replace(READY, exits=ends, streak=streak), restart)
        waits.append(None if again is None else again.since(NOW))
    assert waits[0] is None, "the first is immediate"
    spread = waits[1] / 2.0  # type: ignore[operator]
    assert 1.0 - JITTER <= spread <= 1.0 + JITTER
    assert waits[1:] == pytest.approx([spread * s for s in (2.0, 4.0, 8.0, 16.0, 20.0, 20.0)])
    assert earliest_restart(replace(READY, exits=ends[2:], streak=5), restart) is None, "only planned ends are known"
    other = tuple(replace(end, incarnation="another") for end in ends)
    assert earliest_restart(replace(READY, exits=other, streak=2), restart) != NOW.plus(waits[1] or 0.0)

"""Over a reboot: nobody failed because the box went down, and what was decided before it holds."""

from __future__ import annotations

import pytest
from builders import endpoint, overlay, spec
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, names

from reconciler.plan.actions import Event
from reconciler.plan.endpoints import describe_exit
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import StopProgress
from reconciler.plan.planner import plan
from reconciler.plan.reservations import moment
from reconciler.spec.spec import EndpointSpec, Restart
from reconciler.units import GIB

ONCE = Restart(max_restarts=1)
A, B = endpoint("a", 1, restart=ONCE), endpoint("b", 1, restart=ONCE)


def up(*items: EndpointSpec, crashes: frozenset[str] = frozenset()) -> Run:
    """A box on which all is as it should be, or was given up."""
    run = Run(spec(*items or (A, B)), Plant(totals=[80 * GIB] * 2, behaviour=Behaviour(crashes=crashes)))
    run.settle()
    return run


def end(run: Run, name: str, code: int, failure: str | None = None) -> None:
    """An endpoint ends by itself."""
    current = run.plant.current(name)
    assert current is not None
    run.plant.end(current.id, code)
    run.plant._change(current.id, lambda i: replace(i, failure=failure))


def told(run: Run) -> list[Event]:
    """What the next decision tells of a box that was down; that decision is carried out."""
    decided, _ = run.step()
    return [e for e in decided.events if e.kind == "rebooted"]


@pytest.mark.parametrize("recorded", [True, False])
def test_who_went_down_with_the_box_starts_at_once_and_no_reboot_counts_against_it(recorded: bool) -> None:
    run = up()
    for reboots in range(1, 5):
        run.plant.reboot(300.0, recorded=recorded)
        decided = run.decide()
        starts = [a for a in decided.actions if a.op == "start"]
        assert names(a for a in starts if a.ready) == ["start a", "start b"]
        assert {a.reason for a in starts} == {"it was ended because the box went down"}
        assert (decided.blocked, decided.budgets) == ((), ())
        run.settle()
        assert run.starts() == ["a", "b"] * (reboots + 1)
    assert [(r.streak, r.failed) for r in run.ledger.endpoints.values()] == [(0, None)] * 2


def test_one_event_tells_once_of_a_reboot_and_of_how_each_endpoint_had_ended() -> None:
    run = up()
    end(run, "b", 1, "out of memory")
    at = {"b": moment(run.plant.now.wall), "a": moment(run.plant.now.wall + 10)}
    run.plant.advance(10.0)
    run.plant.reboot(300.0)
    (event,) = told(run)
    assert event.subject == run.spec.node.name
    assert event.message == (
        "the box was rebooted: 2 endpoints ended with it, or unseen before it, which counts against nobody:"
        f" a at {at['a']} with signal 15 (SIGTERM), b at {at['b']} with exit code 1 (out of memory)"
    )
    assert told(run) == []
    run.settle()
    run.plant.reboot(300.0, recorded=False)
    (event,) = told(run)
    assert event.message.endswith(": a without a record of its end, b without a record of its end")


def test_a_reboot_of_a_box_on_which_nothing_ran_is_told_and_of_one_that_nobody_knew_is_not() -> None:
    run = up(replace(A, state="stopped"))
    run.plant.reboot(300.0)
    assert [e.message for e in told(run)] == ["the box was rebooted"]
    fresh = plan(run.spec, run.plant.observe(), Ledger(), run.plant.now)
    assert [e for e in fresh.events if e.kind == "rebooted"] == []


def test_where_the_journal_was_lost_or_the_kernel_is_the_same_no_reboot_is_claimed() -> None:
    run = up(A)
    run.plant.reboot(300.0)
    for ledger in (Ledger(), replace(run.ledger, boot_id=run.plant.boot)):
        decided = plan(run.spec, run.plant.observe(), ledger, run.plant.now)
        (event,) = [e for e in decided.events if e.kind == "rebooted"]
        assert event.message.startswith("the box, or its container, was started anew: 1 endpoint ended with it")
        assert decided.ledger.endpoints["a"].streak == 0


def test_an_end_that_was_counted_before_the_reboot_still_counts_after_it() -> None:
    run = up()
    end(run, "a", 1)
    run.step()
    assert run.ledger.endpoints["a"].streak == 1
    run.plant.reboot(5.0)
    (event,) = told(run)
    assert " a " not in event.message
    assert run.ledger.endpoints["a"].streak == 1
    run.settle()
    end(run, "a", 1)
    assert run.decide().endpoints["a"].state == "failed"


def test_a_back_off_outlives_a_reboot_and_tells_of_the_failure_not_of_the_reboot() -> None:
    long = replace(A, restart=Restart(max_restarts=9, initial_s=200.0, max_s=200.0))
    run = up(long)
    for _ in range(2):
        end(run, "a", 1, "out of memory")
        run.settle(until=lambda decided: bool(decided.blocked) or decided.endpoints["a"].state == "healthy")
    assert [b.reason for b in run.decide().blocked] == ["CoolDown"]
    run.plant.reboot(10.0)
    (blocked,) = run.decide().blocked
    assert blocked.reason == "CoolDown"
    assert blocked.message.endswith("(out of memory)")
    run.plant.reboot(300.0)
    assert names(a for a in run.decide().actions if a.ready and a.op == "start") == ["start a"]


def test_one_that_had_waited_out_its_back_off_starts_at_once_and_one_that_has_to_wait_is_told_why_it_failed() -> None:
    run = up(replace(A, restart=Restart(max_restarts=9, initial_s=200.0, max_s=2000.0)))
    for _ in range(2):
        end(run, "a", 1, "out of memory")
        run.settle(until=lambda decided: decided.endpoints["a"].state == "healthy")
    run.plant.reboot(1.0)
    assert names(a for a in run.decide().actions if a.ready and a.op == "start") == ["start a"]
    run.spec = spec(replace(A, restart=Restart(max_restarts=9, initial_s=2000.0, max_s=2000.0)))
    (blocked,) = run.decide().blocked
    assert (blocked.reason, blocked.message.endswith("(out of memory)")) == ("CoolDown", True)


def test_who_was_given_up_stays_given_up_over_a_reboot() -> None:
    run = up(crashes=frozenset({"a"}))
    assert run.ledger.endpoints["a"].failed is not None
    run.plant.reboot(300.0)
    run.settle()
    assert run.starts().count("a") == 2
    assert run.decide().endpoints["a"].state == "failed"


def test_one_that_was_being_ended_because_it_was_unwell_has_failed_whatever_the_box_did() -> None:
    run = up(A)
    current = run.plant.current("a")
    assert current is not None
    run.ledger = replace(
        run.ledger,
        endpoints={"a": replace(run.ledger.endpoints["a"], unhealthy_since=run.plant.now, ending="it hung")},
    )
    asked = StopProgress(run.plant.now, drained=True, signalled=run.plant.now)
    run.plant._change(current.id, lambda i: replace(i, stop=asked))
    run.plant.reboot(300.0)
    assert [e.message for e in told(run)] == ["the box was rebooted"]
    record = run.ledger.endpoints["a"]
    assert (record.streak, describe_exit(record.exits[-1])) == (1, "signal 15 (ended because it hung)")


def test_a_displaced_endpoint_is_still_displaced_and_its_entry_on_the_agenda_began_when_it_did() -> None:
    run = Run(spec(endpoint("a", 1, priority=1)), Plant(totals=[80 * GIB]))
    run.settle()
    run.plant.advance(600.0)
    run.settle()
    run.spec = spec(endpoint("a", 1, priority=1), overlay("job", 1, priority=500, retries=1))
    run.settle(until=lambda decided: decided.ledger.overlays["job"].state == "active")
    (before,) = run.ledger.agenda
    run.plant.reboot(30.0)
    run.step()
    assert run.decide().endpoints["a"].desired == "displaced"
    assert [(e.endpoint, e.overlay, e.start) for e in run.ledger.agenda] == [("a", "job", before.start)]
    run.settle()
    assert run.ledger.overlays["job"].state == "done"
    assert run.plant.is_ready("a")

"""Over a reboot: what was decided before it, in the time of the boot that is; and what is told of it.

A box that goes down takes every endpoint along. None of them failed by that, so none of these ends is an incident or
counts for the restart policy (`endpoints.fell_with_the_box`): one event tells of all of them.
"""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import Cause
from reconciler.plan.draft import Draft
from reconciler.plan.endpoints import fell_with_the_box
from reconciler.plan.exits import exit_words
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Incarnation, Observed
from reconciler.plan.reservations import moment
from reconciler.units import counted


def carried_over(ledger: Ledger, observed: Observed, now: Instant) -> Ledger:
    """The ledger with its monotonic times carried over a reboot, by the wall clock.

    Of the agenda stays what keeps an endpoint away on an overlay's account. Whoever was on its way is so no more: its
    time went by while the box was off, and what it does next is planned anew.
    """
    if ledger.boot_id in ("", observed.boot_id):
        return ledger

    def carried(instant: Instant | None) -> Instant | None:
        return None if instant is None else Instant(instant.wall, now.mono - max(0.0, now.wall - instant.wall))

    def certain(instant: Instant) -> Instant:
        return carried(instant) or now

    return replace(
        ledger,
        overlays={
            n: replace(
                r,
                since=certain(r.since),
                active_since=carried(r.active_since),
                seen=carried(r.seen),
                spans=tuple(replace(s, began=certain(s.began)) for s in r.spans),
            )
            for n, r in ledger.overlays.items()
        },
        leases=tuple(replace(x, since=certain(x.since)) for x in ledger.leases),
        endpoints={
            n: replace(
                r,
                state_since=carried(r.state_since),
                ready_since=carried(r.ready_since),
                unhealthy_since=carried(r.unhealthy_since),
                renew_before=None,
                nap=None,
                exits=tuple(replace(e, at=certain(e.at)) for e in r.exits),
            )
            for n, r in ledger.endpoints.items()
        },
        quarantines={n: replace(q, since=certain(q.since)) for n, q in ledger.quarantines.items()},
        agenda=tuple(e for e in ledger.agenda if e.overlay is not None and "stopped" in e.expected_states),
    )


def say_that_the_box_went_down(draft: Draft) -> None:
    """One event, once: that the box was rebooted, or its container started anew, and how each endpoint had ended."""
    situation = draft.situation
    ends = sorted(
        f"{one.subject} {_how_it_ended(one)}"
        for one in situation.passing
        if one.subject.kind == "endpoint" and one.subject.name != one.id  # a torn record tells no name
        if fell_with_the_box(one) and all(e.incarnation != one.id for e in situation.record(one.subject.name).exits)
    )
    rebooted = situation.ledger.boot_id not in ("", situation.observed.boot_id)
    if not (rebooted or ends):
        return
    message = "the box was rebooted" if rebooted else "the box, or its container, was started anew"
    if ends:
        who = counted(len(ends), "endpoint")
        message += f": {who} ended with it, or unseen before it, which counts against nobody: {', '.join(ends)}"
    draft.say("rebooted", situation.spec.node.name, message, Cause("drift"))


def _how_it_ended(one: Incarnation) -> str:
    if one.exited is None:
        return "without a record of its end"
    return f"at {moment(one.exited.wall)} with {exit_words(one.exit_code, one.failure, asked_for=True)}"

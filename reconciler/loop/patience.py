"""How long the loop rests where nothing wakes it: what nothing tells of is looked at now and then."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import inf

from reconciler.clock import Instant
from reconciler.loop.tick import Tick

MEMORY_POLL_S, MEMORY_POLL_GROWTH, SLOWEST_MEMORY_POLL_S = 0.1, 0.05, 1.0
"""NVML has no event for memory that came back: while somebody waits for it, it is looked at ten times a second. What is
not there after two seconds may take a minute: from then on after a twentieth of the time waited, or after a second."""
OUTSIDE_POLL_S = 1.0
OUTSIDE = frozenset({"GpuOccupied", "GpuUnknown", "GpuLost", "PortInUse"})
"""What strangers hold: nothing tells of its end either, so it is looked at once a second while it blocks somebody."""


def patience_s(
    tick: Tick,
    now: Instant,
    *,
    unmoved: Collection[str] = (),
    retries: Iterable[float | None] = (),
    at_least_every_s: float = inf,
) -> float:
    """How long to wait after a tick if nothing wakes the loop, in seconds.

    Args:
        tick: what is waited for follows from its plan
        now: the present moment
        unmoved: ended incarnations whose records could not be put away: nobody waits for those
        retries: monotonic seconds at which something that failed may be tried again; None: nothing has
        at_least_every_s: somebody expects a tick this often
    """
    waits = [tick.spec.spec.policy.resync_s, at_least_every_s]
    if any(a.op == "wait_memory" and a.ready for a in tick.plan.actions):
        waits.append(memory_pace_s(tick, now))
    if set(tick.plan.archive).difference(unmoved):
        waits.append(MEMORY_POLL_S)
    if any(b.reason in OUTSIDE for b in tick.plan.blocked):
        waits.append(OUTSIDE_POLL_S)
    if tick.plan.next_wake is not None:
        waits.append(max(0.0, tick.plan.next_wake.since(now)) + 0.001)
    waits.extend(max(0.0, retry - now.mono) + 0.001 for retry in retries if retry is not None)
    return min(waits)


def memory_pace_s(tick: Tick, now: Instant) -> float:
    """Seconds until memory that is waited for is looked at again: as the last one to end, or to fall asleep, has it."""
    naps = (record.nap for record in tick.plan.ledger.endpoints.values())
    since = [nap.slept for nap in naps if nap is not None] + [i.exited for i in tick.observed.incarnations]
    waited_s = min((now.since(moment) for moment in since if moment is not None), default=0.0)
    return min(SLOWEST_MEMORY_POLL_S, max(MEMORY_POLL_S, MEMORY_POLL_GROWTH * waited_s))

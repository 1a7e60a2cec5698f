"""When a convergence that is meant to end has come to its end."""

from __future__ import annotations

from collections.abc import Callable

from reconciler.clock import Clock
from reconciler.loop.tick import Tick
from reconciler.plan.actions import Plan
from reconciler.plan.observed import Observed

AWAITED = ("CoolDown", "GpuUnknown", "WaitingForCapability")
"""What passes by itself within seconds to minutes; any other reason is for a person, or for a daemon, to wait for."""


class Goal:
    """Judges each tick: there is nothing left to do, nothing more can be done, or the time is up."""

    def __init__(
        self,
        clock: Clock,
        *,
        timeout_s: float | None,
        progress: Callable[[Plan, Observed], None],
        names: tuple[str, ...] = (),
    ) -> None:
        self._clock = clock
        self._deadline = None if timeout_s is None else clock.now().plus(timeout_s)
        self._progress = progress
        self._names = names
        """Endpoints whose renewal has to be over as well."""
        self.interrupted = False
        """A signal ended it before its time."""

    def interrupt(self, stop: Callable[[], None]) -> None:
        """A person or a service manager wants it to end now."""
        self.interrupted = True
        stop()

    def reached(self, tick: Tick) -> bool:
        """Whether this tick is the last.

        1. converged, and nothing is under way
        2. what is left is blocked by something that waiting does not change
        3. the time is up
        """
        self._progress(tick.plan, tick.observed)
        if self._deadline is not None and self._clock.now().mono >= self._deadline.mono:
            return True  # 3
        if not tick.idle or self._renewing(tick) or tick.plan.archive:
            return False
        return tick.plan.converged and not any(b.reason in AWAITED for b in tick.plan.blocked)  # 1, 2

    def _renewing(self, tick: Tick) -> list[str]:
        records = tick.plan.ledger.endpoints
        known = [(n, records[n]) for n in self._names if n in records]
        return [n for n, record in known if record.renew_before is not None and not record.failed]

    def verdict(self, tick: Tick) -> tuple[bool, str]:
        """Whether the last tick is a success, and what to tell."""
        plan = tick.plan
        failed = sorted(n for n, v in plan.endpoints.items() if v.state == "failed" and v.desired != "stopped")
        stuck = [b for b in plan.blocked if b.reason not in ("NotYet", "EvictedBy")]
        live = sorted(n for n, r in plan.ledger.overlays.items() if r.state in ("active", "overrun", "starting"))
        if self.interrupted:
            return False, "interrupted; what runs goes on running"
        if failed:
            return False, f"failed: {', '.join(f'{n} ({plan.endpoints[n].reason})' for n in failed)}"
        if stuck:
            return False, "; ".join(f"{b.subject}: {b.reason}: {b.message}" for b in stuck)
        if not plan.converged or self._renewing(tick):
            waiting = sorted({a.subject.name for a in plan.actions if a.ready})
            return False, f"not done in time; waiting for {', '.join(waiting)}"
        if live:
            return True, f"converged; {', '.join(live)} runs on, and only a daemon brings the baseline back after it"
        return True, "the box matches its set points"

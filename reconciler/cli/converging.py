"""One convergence: carried out here, or by the daemon that runs, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from reconciler.cli import wiring
from reconciler.clock import SystemClock
from reconciler.errors import UnknownName

if TYPE_CHECKING:
    from reconciler.plan.actions import Plan
    from reconciler.plan.observed import Observed
    from reconciler.spec.spec import Spec

Converging = Literal["apply", "down", "clean_start"]
Progress = Callable[["Plan", "Observed"], None]


class Outcome(Struct, frozen=True):
    """How a convergence ended."""

    plan: Plan
    observed: Observed
    message: str
    ok: bool
    interrupted: bool = False
    """A signal ended it before its time."""


def converge(
    options: wiring.Options,
    request: Converging,
    *,
    endpoints: tuple[str, ...] = (),
    timeout_s: float | None = None,
    progress: Progress = lambda _plan, _observed: None,
) -> Outcome:
    """`converging`, for callers without an event loop. SIGTERM and SIGINT end it; what runs goes on running."""
    import asyncio

    return asyncio.run(
        converging(options, request, endpoints=endpoints, timeout_s=timeout_s, progress=progress, signals=True)
    )


async def converging(
    options: wiring.Options,
    request: Converging,
    *,
    endpoints: tuple[str, ...] = (),
    timeout_s: float | None = None,
    progress: Progress = lambda _plan, _observed: None,
    signals: bool = False,
) -> Outcome:
    """Converge once: to the set points (`apply`), to nothing running (`down`), or from a clean slate (`clean_start`).

    Raises:
        DaemonRunning: a daemon holds the state directory and converges by itself (`clean_start` asks it instead).
        ReconcilerError: it cannot start.
    """
    import asyncio
    import signal

    from reconciler.loop.converging import Goal
    from reconciler.plan.requests import stopped

    spec = wiring.in_force(options, last_good=request == "down").spec
    unknown = sorted(set(endpoints) - set(spec.endpoints))
    if unknown:
        raise UnknownName(f"no endpoint is named {unknown[0]!r}", name=unknown[0], known=spec.endpoints)
    names = endpoints or tuple(sorted(spec.endpoints))
    asked = (
        await asyncio.to_thread(wiring.ask, wiring.state_dir(options), "clean_start", endpoints=list(names))
        if request == "clean_start"
        else None
    )
    if asked is not None:
        return await asyncio.to_thread(_await_daemon, options, names, timeout_s, progress)

    def as_stopped(spec: Spec) -> Spec:
        return stopped(spec, endpoints or tuple(spec.endpoints))

    goal = Goal(SystemClock(), timeout_s=timeout_s, progress=progress, names=names if request == "clean_start" else ())
    with wiring.daemon(options, as_stopped if request == "down" else None) as daemon:
        running = asyncio.get_running_loop()
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                running.add_signal_handler(number, goal.interrupt, daemon.stop)
        if timeout_s is not None:
            running.call_later(timeout_s, daemon.look_again)
        if request == "clean_start":
            daemon.request_clean_start(names)
        tick = await daemon.run(goal.reached)
    ok, message = goal.verdict(tick)
    return Outcome(tick.plan, tick.observed, message, ok=ok, interrupted=goal.interrupted)


def _await_daemon(
    options: wiring.Options, names: tuple[str, ...], timeout_s: float | None, progress: Progress
) -> Outcome:
    """Follow a clean start that the running daemon carries out."""
    import time

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        time.sleep(0.25)  # another process decides; its socket has no way to say when
        seen = wiring.look(options)
        progress(seen.plan, seen.observed)
        renewing = [n for n in names if (r := seen.ledger.endpoints.get(n)) is not None and r.renew_before is not None]
        failed = [n for n in names if (r := seen.ledger.endpoints.get(n)) is not None and r.failed]
        if failed:
            return Outcome(seen.plan, seen.observed, f"{', '.join(failed)}: failed", ok=False)
        if not renewing and seen.plan.converged:
            return Outcome(seen.plan, seen.observed, *_renewed(seen.plan, names))
        if deadline is not None and time.monotonic() > deadline:
            return Outcome(seen.plan, seen.observed, f"not ready in time: {', '.join(renewing)}", ok=False)


def _renewed(plan: Plan, names: tuple[str, ...]) -> tuple[str, bool]:
    """What became of a clean start that is over, and whether that is a success: giving way to an overlay is one."""
    waiting = {b.subject.name: b for b in plan.blocked if b.subject.kind == "endpoint" and b.subject.name in names}
    told = [f"{name}: {b.reason}: {b.message}" for name, b in sorted(waiting.items())]
    fresh = [n for n in names if n not in waiting and plan.endpoints[n].state == "healthy"]
    message = "; ".join(([f"started afresh: {', '.join(fresh)}"] if fresh else []) + told) or "nothing has to run"
    return message, all(b.reason == "EvictedBy" for b in waiting.values())


def clean_start_preview(options: wiring.Options, endpoints: tuple[str, ...] = ()) -> dict[str, Any]:
    """Whom a clean start would end, and whom it leaves alone.

    Returns:
        `ours`: incarnations (subject, pid, strays, gpus) that would be ended; `foreign`: processes on GPUs
        (gpu, pid, user, command, memory_mib) that are never touched.
    """
    seen = wiring.look(options)
    names = set(endpoints or seen.spec.endpoints)
    indices = {g.uuid: g.index for g in seen.observed.gpus}
    ours = [
        {
            "subject": i.subject.name,
            "pid": i.pid,
            "phase": i.phase,
            "strays": list(i.strays or ()),
            "gpus": [indices[u] for u in i.gpus if u in indices],
        }
        for i in seen.observed.incarnations
        if i.subject.kind == "endpoint" and i.alive and i.subject.name in names
    ]
    foreign = [
        {
            "gpu": g.index,
            "pid": p.pid,
            "user": p.user,
            "command": p.command,
            "memory_mib": None if p.memory_bytes is None else p.memory_bytes >> 20,
        }
        for g in seen.observed.gpus
        for p in g.processes or ()
        if p.owner is None
    ]
    return {"ours": ours, "foreign": foreign}

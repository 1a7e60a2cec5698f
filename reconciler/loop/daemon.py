"""The loop: look, decide, make it durable, act; then wait until something may have changed.

One tick is the whole program in small. Nothing is remembered from tick to tick but what the journal holds and what is
under way; whatever woke the loop, the tick looks at everything and lets the planner decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Any, Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.act.engine import EngineActor, Order
from reconciler.act.notify import deliver
from reconciler.act.process import Launch, ProcessActor
from reconciler.clock import Clock, Instant
from reconciler.errors import StateError, is_shortage
from reconciler.health.assess import Facts, assess, assess_blindness
from reconciler.health.incident import Incident
from reconciler.health.notices import Notice
from reconciler.journal.archive import archive
from reconciler.journal.codec import encode
from reconciler.journal.decisions import Inputs, Made
from reconciler.journal.journal import UNKEPT, Journal
from reconciler.journal.layout import StateDir
from reconciler.loop.control import ControlServer
from reconciler.loop.deciding import decide
from reconciler.loop.executor import Executor
from reconciler.loop.history import Learner, record_durations
from reconciler.loop.launching import launch_of
from reconciler.loop.leftovers import Leftovers
from reconciler.loop.notifying import Notifying
from reconciler.loop.requested import Requested, forgiving
from reconciler.loop.specs import SpecInForce, SpecKeeper
from reconciler.loop.wakers import Wakers
from reconciler.observe.nvml import CACHED, WAITING
from reconciler.observe.snapshot import ObserveOptions, endpoint_of
from reconciler.plan.actions import Action, Event, Plan
from reconciler.plan.departures import kept_for, stop_for
from reconciler.plan.ledger import Ledger
from reconciler.plan.naps import called
from reconciler.plan.observed import Incarnation, Observed
from reconciler.plan.requests import clean_start
from reconciler.plan.status import DaemonInfo, status_data
from reconciler.spec.spec import Notifier, Spec, Stop

MEMORY_POLL_S, MEMORY_POLL_GROWTH, SLOWEST_MEMORY_POLL_S = 0.1, 0.05, 1.0
"""NVML has no event for memory that came back: while somebody waits for it, it is looked at ten times a second. What is
not there after two seconds may take a minute: from then on after a twentieth of the time waited, or after a second."""
CALM_S = 0.25
"""Nothing happened for so long: what is under way is through with its first steps, and what mostly follows an event has
followed. On a large box what comes then takes some hundredths of a second, in which nobody is served."""
FIRST_STEPS_S = 0.03
"""An interpreter has begun, and is through with most of what it reads of the disk: half of a restart is that."""
NEVER_CALM_S = 1.0
"""Where something happens all the time, what waits for a calm moment waits no longer."""
FIRST_BLIND_S, MOST_BLIND_S = 0.25, 10.0
"""Between two looks where one could not be taken; they double."""
OUTSIDE_POLL_S = 1.0
OUTSIDE = frozenset({"GpuOccupied", "GpuUnknown", "GpuLost", "PortInUse"})
"""What strangers hold: nothing tells of its end either, so it is looked at once a second while it blocks somebody."""


class Eyes(Protocol):
    """Whoever looks at the box."""

    def observe(self, spec: Spec, options: ObserveOptions) -> Observed:
        """One look."""
        ...

    def watches(self) -> Mapping[int, str]:
        """Descriptors that become readable when a process of ours ends."""
        ...

    def probe_now(self, incarnations: Collection[str]) -> None:
        """Ask these at once."""
        ...

    def owns_listener(self, incarnation: str, port: int) -> bool | None:
        """Whether who listens on a port is this incarnation; None: could not be seen."""
        ...

    def close(self) -> None:
        """Let go of threads and descriptors."""
        ...


class Parts(Struct, frozen=True):
    """Everything a daemon is made of; put together in `cli.wiring`."""

    state: StateDir
    clock: Clock
    journal: Journal
    specs: SpecKeeper
    actor: ProcessActor
    engines: EngineActor
    eyes: Callable[[Callable[[], None]], Eyes]
    """Given a function that wakes the loop from any thread."""
    inherited: Mapping[str, str]
    """This process's environment."""
    simulated: Mapping[str, str]
    """What a simulated node adds to a child's environment."""
    pid: int
    hold: Callable[[], None] = lambda: None
    """Sees to it that the state directory is still this daemon's own (`WriterLock.keep`)."""
    faces: Sequence[Face] = ()
    open_files: int | None = None
    """Soft limit of descriptors for what is run; None: this process's own."""
    leftovers: Leftovers | None = None
    """Follows files in /dev/shm; None: where there are none, as on a box in virtual time."""
    at_least_every_s: float = inf
    """Somebody expects a tick this often, whatever the set points say of `resync`."""


class Tick(Struct, frozen=True):
    """What one tick saw and decided."""

    spec: SpecInForce
    observed: Observed
    plan: Plan
    incidents: tuple[Incident, ...]
    idle: bool
    """No operation is under way."""
    seconds: float = 0.0
    """How long it took to look, to decide and to begin, the starts that it carried out included."""
    untold: Mapping[str, int] = field(default_factory=dict)
    """By notifier: deliveries given up since this daemon began."""


class Face(Protocol):
    """Somebody who shows each tick to the outside."""

    async def show(self, tick: Tick) -> Sequence[Event]:
        """Take note of a tick; the answer is what the journal should tell of that."""
        ...

    async def close(self) -> None:
        """Let go of sockets."""
        ...


class Daemon:
    """The one writer of a state directory."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last: Tick | None = None
        self._wakers = Wakers()
        self._eyes = parts.eyes(self._wakers.wake_threadsafe)
        self._began = parts.clock.now()
        self._control = ControlServer(parts.state.control_socket, self._answer)
        self._learner = Learner()
        self._requested = Requested(parts.clock, self._wakers.wake)
        self._problems: tuple[str, ...] = ()
        self._executor = Executor(
            parts.actor,
            parts.clock,
            launch_of=self._launch_of,
            stop_of=self._stop_of,
            call_engine=self._call_engine,
            called=self._called,
            report=self._report,
            wake=self._wakers.wake,
        )
        self._notifying = Notifying(parts.journal, parts.clock, deliver=self._deliver, wake=self._wakers.wake)
        self._gone: set[str] = set()
        """Incarnations whose records were put away since `_tidy`."""
        self._tidied = self._began
        self._stopping = False
        self._unmoved: set[str] = set()
        """Ended incarnations whose records could not be put away."""
        self._blind = 0
        """Looks in a row that could not be taken, as far as they matter."""
        self._looked = asyncio.Event()
        """Set once there is something to answer with."""

    async def run(self, until: Callable[[Tick], bool] | None = None) -> Tick:
        """Converge, for ever or until `until` says of a tick that it is enough; the last tick is returned.

        Raises:
            SpecError: the files are wrong and there never was a good version.
            StateError: the state directory can no longer be written.
        """
        try:
            await self._control.open()
            self._load()
            while True:
                try:
                    last = await self._turn(until)
                except (OSError, StateError) as error:
                    if until is not None or self._stopping or not is_shortage(error):
                        raise
                    await self._wait_blind(error)
                else:
                    if last is not None:
                        return last
        finally:
            await self._close()

    async def _turn(self, until: Callable[[Tick], bool] | None) -> Tick | None:
        """One tick, and the rest after it; the tick, if it was the last one."""
        tick = await self._tick()
        self._wakers.watch_files(self._parts.specs.path, self._parts.specs.overlays_folder)
        for face in self._parts.faces:
            self._parts.journal.append(await face.show(tick), self._parts.clock.now())
        if self._stopping or (until is not None and until(tick)):
            await self._tidy(tick)
            return tick
        if until is not None and self._unmoved:
            raise StateError(f"{self._parts.state.run}: records cannot be put away", hint="reconciler events")
        self._blind = 0
        await self._rest(tick)
        return None

    def stop(self) -> None:
        """End the loop after the present tick; endpoints and workloads stay as they are."""
        self._stopping = True
        self._wakers.wake()

    def look_again(self) -> None:
        """Have the next tick begin now."""
        self._wakers.wake()

    def request_clean_start(self, endpoints: Collection[str]) -> None:
        """Have these endpoints ended and started afresh with the next tick."""
        names = tuple(endpoints)
        self._requested.note(lambda ledger, now: clean_start(ledger, names, now))
        self._wakers.wake()

    # ------------------------------------------------------------ one tick

    async def _tick(self) -> Tick:
        parts, began = self._parts, self._parts.clock.now()
        parts.hold()
        await self._control.keep()
        parts.actor.warm()
        in_force = self._load()
        options = self._look_options(parts.journal.ledger())
        observed = await asyncio.to_thread(self._eyes.observe, in_force.spec, options)
        # after the look, and nothing is waited for from here to the walk: a call that ended during the look is not made
        # a second time by a plan that does not know of it
        ledger, asked = self._requested.take(parts.journal.ledger())
        now = parts.clock.now()
        ledger = self._learner.learn(ledger, parts.journal.timings(), in_force.spec)
        plan = decide(in_force.spec, observed, ledger, now)
        before = parts.journal.ledger()
        made = Made(Inputs(in_force.spec, observed, ledger, now), plan)
        parts.journal.commit(plan.ledger, (*asked, *plan.events), now, made)  # the record first, then the act
        self._requested.committed()
        draining = [a.incarnation for a in plan.actions if a.op == "drain" and a.ready and a.incarnation]
        known = self._last.incidents if self._last else tuple(parts.journal.incidents())
        self._last = Tick(in_force, observed, plan, known, idle=False)  # what the starts are launched with
        started = await self._executor.walk(plan)
        if draining:
            self._eyes.probe_now(draining)
        self._wakers.watch_processes(self._eyes.watches())
        self._wakers.pass_over({i.id for i in observed.incarnations if i.alive})
        seconds = parts.clock.now().since(began)
        if started:  # nobody waits for what follows, and on a small box it would be in the way of their first steps
            await self._wakers.undisturbed(FIRST_STEPS_S)
            self._wakers.wake()  # to see them
        incidents = self._assess(in_force, observed, plan, now)
        self._last = replace(self._last, incidents=incidents)
        self._notifying.offer(in_force.spec, incidents)
        ended = [i for i in observed.incarnations if i.id in plan.archive]
        fresh = {i.id for i in ended} - self._unmoved
        record_durations(parts.journal, before, plan.ledger, observed, self._began, fresh)
        self._unmoved = {i.id for i in ended if not self._put_away(in_force.spec, i)}
        self._gone |= fresh
        parts.journal.keep(UNKEPT)
        self._looked.set()
        untold = dict(self._notifying.failures)
        return replace(self._last, idle=not self._executor.busy, seconds=seconds, untold=untold)

    async def _wait_blind(self, error: Exception) -> None:
        """Tell that no look could be taken, for want of descriptors, say, and let some time pass before the next one.

        What was decided before is in the ledger, and what was begun goes on.
        """
        now, journal, spec = self._parts.clock.now(), self._parts.journal, self._parts.specs.in_force.spec
        known = journal.incidents(include_resolved=False)
        why = error.message if isinstance(error, StateError) else str(error)
        incidents, events = assess_blindness(spec.node.name, why, known, now)
        journal.save_incidents(incidents)
        journal.append(events, now)
        self._notifying.offer(spec, incidents)
        await self._wakers.wait(min(MOST_BLIND_S, FIRST_BLIND_S * 2.0**self._blind))
        self._blind = min(self._blind + 1, 10)

    def _put_away(self, spec: Spec, ended: Incarnation) -> bool:
        """Whether its records could be put away; if not, as on a disk that is read-only by now, it is told once.

        They do no harm where they are: it counts as ended.
        """
        try:
            archive(self._parts.state, ended.id, keep=kept_for(spec, ended.subject))
        except OSError as error:
            if ended.id not in self._unmoved:
                self._report([Event("records.kept", ended.subject.name, f"cannot be put away: {error}", "cleanup")])
            return False
        return True

    async def _rest(self, tick: Tick) -> None:
        """Wait for something to happen. What nobody waits for at all is done once nothing did for a moment."""
        patience_s = self._patience(tick)
        woken = await self._wakers.wait(min(CALM_S, patience_s))
        if (not woken and patience_s > CALM_S) or self._parts.clock.now().since(self._tidied) >= NEVER_CALM_S:
            self._parts.journal.keep()
            await self._tidy(tick)
        if not woken and patience_s > CALM_S:
            await self._wakers.wait(patience_s - CALM_S)

    async def _tidy(self, tick: Tick) -> None:
        """See what lives in shared memory, and remove what ended ones left there."""
        self._tidied = now = self._parts.clock.now()
        ended, self._gone = frozenset(self._gone), set()
        if self._parts.leftovers is not None:
            await self._parts.leftovers.follow(tick.observed)
            self._parts.journal.append(await self._parts.leftovers.clear(ended), now)

    def _load(self) -> SpecInForce:
        """The spec in force, read again if files may have changed."""
        journal = self._parts.journal
        self._wakers.files_changed = False
        in_force = self._parts.specs.load(journal.ledger())
        journal.save_texts(in_force.texts, in_force.spec.digest)
        problems = tuple(str(p) for p in in_force.problems)
        now = self._parts.clock.now()
        for problem in problems:
            if problem not in self._problems:
                journal.append([Event("spec.rejected", in_force.spec.node.name, problem, "edit")], now)
        if self._problems and not problems:
            accepted = Event("spec.accepted", in_force.spec.node.name, "the files are in force again", "edit")
            journal.append([accepted], now)
        self._problems = problems
        return in_force

    def _look_options(self, ledger: Ledger) -> ObserveOptions:
        last = self._last.plan if self._last else None
        ready = [r.ready_incarnation for r in ledger.endpoints.values() if r.ready_incarnation]
        gpus = CACHED if last is not None and last.converged else WAITING
        ended = bool(self._wakers.ended)
        self._wakers.ended.clear()  # before the look: one that ends during it has the next one look again
        naps = [r.nap for r in ledger.endpoints.values() if r.nap is not None]
        draining = [nap.incarnation for nap in naps if nap.begun is None]
        return ObserveOptions(gpus=gpus, ended=ended, ready_before=ready, draining=draining)

    def _assess(self, in_force: SpecInForce, observed: Observed, plan: Plan, now: Instant) -> tuple[Incident, ...]:
        journal = self._parts.journal
        facts = Facts(in_force.spec, plan.endpoints, plan.ledger, observed, in_force.problems, plan.blocked)
        incidents, events = assess(facts, journal.incidents(include_resolved=False), now)
        journal.save_incidents(incidents)
        if events:
            journal.append(events, now)
        return incidents

    def _patience(self, tick: Tick) -> float:
        """How long to wait if nothing wakes the loop, in seconds."""
        now = self._parts.clock.now()
        waits = [tick.spec.spec.policy.resync_s, self._parts.at_least_every_s]
        if any(a.op == "wait_memory" and a.ready for a in tick.plan.actions):
            waits.append(_memory_pace(tick, now))
        if set(tick.plan.archive) - self._unmoved:
            waits.append(MEMORY_POLL_S)
        if any(b.reason in OUTSIDE for b in tick.plan.blocked):
            waits.append(OUTSIDE_POLL_S)
        if tick.plan.next_wake is not None:
            waits.append(max(0.0, tick.plan.next_wake.since(now)) + 0.001)
        for retry in (self._executor.next_retry(), self._notifying.next_retry()):
            if retry is None:
                continue
            waits.append(max(0.0, retry - now.mono) + 0.001)
        return min(waits)

    # ------------------------------------------------------------ what the executor needs

    def _launch_of(self, action: Action) -> Launch:
        tick_spec, observed = self._parts.specs.in_force.spec, self._observed_now()
        return launch_of(action, tick_spec, observed, inherited=self._parts.inherited, simulated=self._parts.simulated)

    def _observed_now(self) -> Observed:
        assert self._last is not None  # noqa: S101 - for the type checker: who acts has a plan, made from a look
        return self._last.observed

    def _stop_of(self, action: Action) -> Stop:
        started = next((i for i in self._observed_now().incarnations if i.id == action.incarnation), None)
        return stop_for(self._parts.specs.in_force.spec, action.subject, started)

    async def _call_engine(self, action: Action) -> None:
        observed, spec = self._observed_now(), self._parts.specs.in_force.spec
        incarnation = next((i for i in observed.incarnations if i.id == action.incarnation), None)
        endpoint = endpoint_of(spec, incarnation) if incarnation is not None else None
        record = self._parts.journal.ledger().endpoints.get(action.subject.name)
        if incarnation is None or incarnation.port is None or endpoint is None or record is None or record.nap is None:
            raise StateError(f"{action.subject} is no longer there to {action.op}")
        profile = endpoint.profile
        level = profile.sleep_levels[record.nap.level]
        order = Order(
            incarnation=incarnation.id,
            port=incarnation.port,
            calls=level.sleep if action.op == "sleep" else level.wake,
            check=profile.sleep_check,
            asleep=action.op == "sleep",
        )
        await self._parts.engines.ensure(order, self._eyes.owns_listener, timeout_s=action.timeout_s)

    def _called(self, action: Action, problem: str | None) -> None:
        at = self._parts.clock.now()  # not when it is noted: the answer that is asked for now must not seem older
        self._requested.note(lambda ledger, _: called(ledger, action, problem, at))
        self._eyes.probe_now([action.incarnation or ""])

    async def _deliver(self, notifier: Notifier, notices: Sequence[Notice]) -> None:
        node, parts = self._parts.specs.in_force.spec.node.name, self._parts
        await deliver(notifier, node, notices, parts.inherited, open_files=parts.open_files)

    def _report(self, events: Sequence[Event]) -> None:
        self._parts.journal.append(events, self._parts.clock.now())

    # ------------------------------------------------------------ what people ask

    async def _answer(self, op: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer one request at the control socket; one that comes before the first look waits for it."""
        if op == "files":
            return {"setpoints": str(self._parts.specs.path)}
        await self._looked.wait()
        assert self._last is not None  # noqa: S101 - for the type checker: that is what was waited for
        tick = self._last
        match op:
            case "status":
                spec, problems, now = tick.spec.spec, tick.spec.problems, self._parts.clock.now()
                return status_data(spec, tick.observed, tick.plan, tick.incidents, self.info(), problems, now=now)
            case "values":
                return {
                    "observed": encode(tick.observed),
                    "ledger": encode(
                        replace(
                            self._parts.journal.ledger(),
                            timings=tick.plan.ledger.timings,
                            runs=tick.plan.ledger.runs,
                        )
                    ),
                    "incidents": [encode(i) for i in tick.incidents],
                    "daemon": encode(self.info()),
                    "setpoints": str(self._parts.specs.path),
                }
            case "reset":
                change, said = forgiving(self._parts.journal.ledger(), str(request["name"]), tick.observed)
                await self._requested.durably(change)
                return {"message": said}
            case "clean_start":
                names = [str(n) for n in request["endpoints"]]
                await self._requested.durably(lambda ledger, now: clean_start(ledger, names, now))
                return {"message": "begun"}
            case _:
                raise StateError(f"the daemon does not know the request {op!r}")

    def info(self) -> DaemonInfo:
        """Who this daemon is."""
        return DaemonInfo(
            running=True,
            pid=self._parts.pid,
            since=self._began.wall,
            generation=self._parts.journal.generation(),
        )

    async def _close(self) -> None:
        self._requested.abandon()
        await self._control.close()
        await self._wakers.close()
        for face in self._parts.faces:
            await face.close()
        await self._notifying.close()
        await self._executor.close()
        self._eyes.close()
        with suppress(StateError):  # the replay of one decision; what ends the daemon may be that it cannot write
            self._parts.journal.keep()


def _memory_pace(tick: Tick, now: Instant) -> float:
    """Seconds until memory that is waited for is looked at again: as the last one to end, or to fall asleep, has it."""
    naps = (record.nap for record in tick.plan.ledger.endpoints.values())
    since = [nap.slept for nap in naps if nap is not None] + [i.exited for i in tick.observed.incarnations]
    waited_s = min((now.since(moment) for moment in since if moment is not None), default=0.0)
    return min(SLOWEST_MEMORY_POLL_S, max(MEMORY_POLL_S, MEMORY_POLL_GROWTH * waited_s))

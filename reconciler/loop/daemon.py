"""The loop: look, decide, make it durable, act; then wait until something may have changed.

One tick is the whole program in small. Nothing is remembered from tick to tick but what the journal holds and what is
under way; whatever woke the loop, the tick looks at everything and lets the planner decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from msgspec.structs import replace

from reconciler.act.notify import deliver
from reconciler.act.process import Launch
from reconciler.clock import Instant
from reconciler.errors import StateError, is_shortage
from reconciler.health.assess import Facts, assess, assess_blindness
from reconciler.health.incident import Incident
from reconciler.health.notices import Notice
from reconciler.journal.decisions import Inputs, Made
from reconciler.journal.journal import UNKEPT
from reconciler.loop.aftermath import Aftermath
from reconciler.loop.answering import Answering
from reconciler.loop.calling import order_of
from reconciler.loop.control import ControlServer
from reconciler.loop.deciding import decide
from reconciler.loop.executor import Executor, told
from reconciler.loop.history import Learner, record_durations
from reconciler.loop.launching import launch_of
from reconciler.loop.notifying import Notifying
from reconciler.loop.parts import Parts
from reconciler.loop.patience import patience_s
from reconciler.loop.requested import Requested
from reconciler.loop.specs import SpecInForce
from reconciler.loop.tick import Tick
from reconciler.loop.wakers import Wakers
from reconciler.observe.nvml import CACHED, WAITING
from reconciler.observe.snapshot import ObserveOptions
from reconciler.plan.actions import Action, Event, Plan
from reconciler.plan.departures import stop_for
from reconciler.plan.ledger import Ledger
from reconciler.plan.naps import called
from reconciler.plan.observed import Observed
from reconciler.plan.requests import clean_start
from reconciler.spec.spec import Notifier, Stop

CALM_S = 0.25
"""Nothing happened for so long: what is under way is through with its first steps, and what mostly follows an event has
followed. On a large box what comes then takes some hundredths of a second, in which nobody is served."""
FIRST_STEPS_S = 0.03
"""An interpreter has begun, and is through with most of what it reads of the disk: half of a restart is that."""
NEVER_CALM_S = 1.0
"""Where something happens all the time, what waits for a calm moment waits no longer."""
FIRST_BLIND_S, MOST_BLIND_S = 0.25, 10.0
"""Between two looks where one could not be taken; they double."""


class Daemon:
    """The one writer of a state directory."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last: Tick | None = None
        self._wakers = Wakers()
        self._eyes = parts.eyes(self._wakers.wake_threadsafe)
        self._began = parts.clock.now()
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
        answering = Answering(
            parts,
            self._requested,
            began=self._began,
            last_tick=self._last_tick,
            failing=self._executor.failing,
        )
        self._control = ControlServer(parts.state.control_socket, answering.answer)
        self._notifying = Notifying(parts.journal, parts.clock, deliver=self._deliver, wake=self._wakers.wake)
        self._aftermath = Aftermath(parts, self._report)
        self._tidied = self._began
        self._stopping = False
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
        if until is not None and self._aftermath.unmoved:
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
        due = self._executor.due(plan)
        # the record first, then the act
        parts.journal.commit(plan.ledger, (*asked, *plan.events, *told(due)), now, made)
        self._requested.committed()
        draining = [a.incarnation for a in plan.actions if a.op == "drain" and a.ready and a.incarnation]
        known = self._last.incidents if self._last else tuple(parts.journal.incidents())
        self._last = Tick(in_force, observed, plan, known, idle=False)  # what the starts are launched with
        started = await self._executor.walk(due)
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
        fresh = self._aftermath.fresh(ended)
        record_durations(parts.journal, before, plan.ledger, observed, self._began, fresh)
        self._aftermath.put_away(in_force.spec, ended)
        parts.journal.keep(UNKEPT)
        await self._control.keep()
        parts.actor.warm()
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

    async def _rest(self, tick: Tick) -> None:
        """Wait for something to happen. What nobody waits for at all is done once nothing did for a moment."""
        longest_s = self._patience_s(tick)
        woken = await self._wakers.wait(min(CALM_S, longest_s))
        if (not woken and longest_s > CALM_S) or self._parts.clock.now().since(self._tidied) >= NEVER_CALM_S:
            self._parts.journal.keep()
            await self._tidy(tick)
        if not woken and longest_s > CALM_S:
            await self._wakers.wait(longest_s - CALM_S)

    def _patience_s(self, tick: Tick) -> float:
        return patience_s(
            tick,
            self._parts.clock.now(),
            unmoved=self._aftermath.unmoved,
            retries=(self._executor.next_retry(), self._notifying.next_retry()),
            at_least_every_s=self._parts.at_least_every_s,
        )

    async def _tidy(self, tick: Tick) -> None:
        self._tidied = self._parts.clock.now()
        await self._aftermath.clear(tick.observed)

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

    # ------------------------------------------------------------ what those need who act and who answer

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
        spec, ledger = self._parts.specs.in_force.spec, self._parts.journal.ledger()
        order = order_of(action, spec, self._observed_now(), ledger)
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

    async def _last_tick(self) -> Tick:
        await self._looked.wait()
        assert self._last is not None  # noqa: S101 - for the type checker: that is what was waited for
        return self._last

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

"""The real loop, planner, health rules, journal and executor over a simulated plant, on virtual time.

Simulated are what the actor, the eyes and the engines would do to a machine; everything that decides, and everything
that is written, is the program's own. The plant refuses what a machine refuses, and notes what must never happen.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from accounting import Account
from builders import NOW, foreign, uuid
from files import put
from msgspec.structs import replace
from plant import Behaviour, Plant
from scenario import Drop, Fault, Scenario
from virtual import STEP_S, VirtualLoop

from reconciler.act.engine import Order
from reconciler.act.process import Launch
from reconciler.clock import Instant
from reconciler.errors import ActError, NotOurs, PortInUse, SpecError, StateError
from reconciler.health.incident import Incident
from reconciler.journal.decisions import Made
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir
from reconciler.loop import aftermath, launching, specs
from reconciler.loop.daemon import Daemon
from reconciler.loop.parts import Parts
from reconciler.loop.requested import forgiving
from reconciler.loop.specs import SpecKeeper
from reconciler.loop.tick import Tick
from reconciler.observe.snapshot import CLOCK_JUMP_S, ObserveOptions
from reconciler.plan.actions import Event
from reconciler.plan.ledger import LIVE, Ledger
from reconciler.plan.observed import Incarnation, Observed, PortHolder, StopProgress
from reconciler.spec.load import SourceText, resolve_texts
from reconciler.spec.spec import Spec, Stop
from reconciler.units import GIB

RESTART_S = 2.0
"""Between the end of a daemon and the next one, as under systemd."""
SETTLE_S = 4 * 3600.0
"""Virtual time in which the box has to be as its files say, once nothing breaks any more."""
TENDED_S = 500.0
"""After each fault, where somebody looks after the box."""
MOST_TICKS = 6000
HANG_SEEN_S = 15.0
FOREIGN_GIB = 70


class ViolationError(AssertionError):
    """Something happened that must never happen."""


class Dead(asyncio.CancelledError):
    """This daemon was killed: nothing of it does anything any more."""


class KillableJournal(Journal):
    """The journal, in front of and behind whose every write a daemon can die, and whose disk can be full."""

    box: Box | None = None
    previous: Ledger = Ledger()

    def commit(self, ledger: Ledger, events: Sequence[Event], now: Instant, made: Made | None = None) -> None:
        self.previous = self.ledger()
        self._write("commit", lambda: super(KillableJournal, self).commit(ledger, events, now, made))

    def keep(self, least: int = 1) -> None:
        if len(self._unkept) >= least:
            self._write("keep", lambda: super(KillableJournal, self).keep(least))

    def append(self, events: Sequence[Event], now: Instant, *, data: Mapping[str, object] | None = None) -> int:
        if events:
            self._write("append", lambda: super(KillableJournal, self).append(events, now, data=data))
        return 0

    def save_incidents(self, incidents: Any) -> None:
        kept = tuple(incidents)
        self._write("incidents", lambda: super(KillableJournal, self).save_incidents(kept))

    def save_texts(self, files: Mapping[str, str], digest: str) -> None:
        self._write("texts", lambda: super(KillableJournal, self).save_texts(files, digest))

    def record_timing(self, subject: str, what: Any, seconds: float) -> None:
        self._write("timing", lambda: super(KillableJournal, self).record_timing(subject, what, seconds))

    def _write(self, what: str, write: Callable[[], object]) -> None:
        assert self.box is not None
        self.box.boundary(f"before {what}")
        if self.box.disk_full:
            raise StateError("journal: cannot be written: No space left on device")
        write()
        self.box.boundary(f"after {what}")


class Box:
    """One machine with its files, from the first daemon to the last."""

    def __init__(self, folder: Path, scenario: Scenario, loop: VirtualLoop) -> None:
        self.scenario, self.loop, self.clock = scenario, loop, loop.clock
        self.began = self.clock.now()
        self.state = StateDir(folder / "state")
        self.state.ensure()
        self.setpoints = folder / "setpoints.yaml"
        self.overlays = folder / "overlays"
        self.overlays.mkdir()
        self.whole = json.dumps(scenario.setpoints())
        put(self.setpoints, self.whole)
        behaviour = Behaviour(
            load_s=scenario.load_s,
            stop_s=scenario.stop_s,
            memory_return_s=scenario.memory_return_s,
            run_s={d.name: d.run_s for d in scenario.drops},
            exit_codes={d.name: d.codes for d in scenario.drops},
        )
        self.plant = Plant(totals=[scenario.gib * GIB] * scenario.gpus, now=self.began, behaviour=behaviour)
        self.plant.host_bytes = scenario.host_gib * GIB
        self.calls: dict[str, tuple[str, asyncio.Future[str | None]]] = {}
        """Incarnation → what its engine is busy with, and what comes of it: a problem, or None."""
        self.nap_faults: set[str] = set()
        """What calls to sleep and to wake up meet at present."""
        self.dropped: dict[str, Drop] = {}
        """Overlays whose files people mean to be there."""
        self.trace: list[str] = []
        self.incidents: dict[str, Incident] = {}
        """Everything that was ever open, as last seen."""
        self.struck: list[tuple[str, str, float]] = []
        """Kind, subject and epoch second of what was done to somebody who was well."""
        self.work_starts: Counter[str] = Counter()
        self.evictions: set[tuple[str, float]] = set()
        self.boundaries = 0
        self.ticks = 0
        self.dead = True
        self.kill_in: int | None = None
        self.disk_full = False
        self.driver_down = False
        self.look_s = 0.0
        self.unknown: set[str] = set()
        """Incarnations whose identity cannot be verified at present."""
        self.unkillable: set[str] = set()
        """Subjects whose processes no signal ends at present."""
        self.daemon: Daemon | None = None
        self.journal: KillableJournal | None = None
        self.main: asyncio.Task[Tick] | None = None
        self._next: asyncio.TimerHandle | None = None
        self._serial = 0
        self._ends: dict[str, asyncio.Event] = {}
        self._ahead: float | None = None
        self.last: Tick | None = None
        self.violation: ViolationError | None = None

    # ------------------------------------------------------------ files

    def drop(self, drop: Drop) -> None:
        self.dropped[drop.name] = drop
        folder = self.overlays if self.overlays.is_dir() else self.overlays.with_name("away")
        put(folder / f"{drop.name}.yaml", json.dumps(drop.body))
        self.note(f"drop {drop.name}")
        self.wake(files=True)

    # ------------------------------------------------------------ time

    @property
    def elapsed(self) -> float:
        return self.loop.time() - self.began.mono

    def note(self, text: str) -> None:
        self.trace.append(f"{self.elapsed:.3f} {text}")

    def wake(self, *, files: bool = False, ended: bool = False) -> None:
        if self.daemon is not None and not self.dead:
            self.daemon._wakers.files_changed |= files
            if ended:
                self.daemon._wakers.ended.add("anybody")
            self.daemon._wakers.wake()

    def catch_up(self) -> None:
        """Let what is due by now happen in the plant."""
        living = {i.id for i in self.plant.incarnations if i.alive}
        for name in [n for n in self.plant.ends_at if self._subject_of(n) in self.unkillable]:
            at, code = self.plant.ends_at[name]
            self.plant.ends_at[name] = (max(at, self.clock.now().mono + 1.0), code)
        self.plant.now = self.clock.now()
        self.plant.advance(0.0)
        for gone in sorted(living - {i.id for i in self.plant.incarnations if i.alive}):
            self.note(f"ended {gone}")
            self._ends.setdefault(gone, asyncio.Event()).set()
            self.wake(ended=True)
        self.reschedule()

    def _subject_of(self, incarnation: str) -> str:
        return next((i.subject.name for i in self.plant.incarnations if i.id == incarnation), "")

    def reschedule(self) -> None:
        if self._next is not None:
            self._next.cancel()
        event = self.plant.next_event()
        self._next = None if event is None else self.loop.call_at(event + STEP_S, self._due)

    def _due(self) -> None:
        self.catch_up()
        self.wake()

    # ------------------------------------------------------------ daemons

    def boundary(self, what: str) -> None:
        """Between any two writes and acts: a daemon can die here."""
        if self.dead:
            raise Dead
        self.boundaries += 1
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in <= 0:
                self.kill_in = None
                self.note(f"killed {what}")
                self.die()
                raise Dead

    def never(self, what: str) -> None:
        """Something that must never happen did: the story ends here, whoever noticed it."""
        self.violation = ViolationError(what)
        self.die()
        raise self.violation

    def die(self) -> None:
        self.dead = True
        if self.main is not None:
            self.main.cancel()

    async def live(self) -> None:
        """Daemon after daemon until the box has stood as it should for a while, or its time is up."""
        self.loop.call_later(self.scenario.over, self.heal)
        for drop in self.scenario.drops:
            self.loop.call_later(drop.at, self.drop, drop)
        for fault in self.scenario.faults:
            self.loop.call_later(fault.at, self.strike, fault)
            if self.scenario.tended:
                self.loop.call_later(fault.at + TENDED_S, self.reset_all)
        limit = self.scenario.over + SETTLE_S
        while self.elapsed < limit:
            try:
                self.daemon, self.journal = self.make()
                self.dead = False
                self.daemon._wakers.watch_files = lambda *_: None  # type: ignore[method-assign]
                self.main = asyncio.create_task(self.daemon.run(self.settled))
                give_up = self.loop.call_later(limit - self.elapsed, self.main.cancel)
                try:
                    self.last = await self.main
                finally:
                    give_up.cancel()
            except asyncio.CancelledError:
                if self.violation is not None:
                    raise self.violation from None
                self.note("dead")
            except (StateError, SpecError) as error:
                self.note(f"gave up: {type(error).__name__}")
            else:
                self.note("settled")
                return
            finally:
                self.dead = True
                if self.journal is not None:
                    self.journal.close()
            await asyncio.sleep(RESTART_S)
        raise ViolationError(f"not as its files say within {SETTLE_S:g} s: {self.describe()}")

    def make(self) -> tuple[Daemon, KillableJournal]:
        journal = KillableJournal.open(self.state.journal, self.clock)
        journal.box = self
        remembered = journal.texts()
        parts = Parts(
            state=self.state,
            clock=self.clock,
            journal=journal,
            specs=SpecKeeper(self.setpoints, remembered.files if remembered else {}, transform=None),
            actor=SimActor(self),  # type: ignore[arg-type]
            engines=SimEngines(self),  # type: ignore[arg-type]
            eyes=lambda _wake: SimEyes(self),
            inherited={},
            simulated={},
            pid=1,
            faces=[self],
        )
        return Daemon(parts), journal

    def settled(self, tick: Tick) -> bool:
        """The files are in force, and the box is as they say."""
        if self.elapsed < self.scenario.over + 1 or not tick.idle or not tick.spec.current:
            return False
        records = tick.plan.ledger.overlays
        over = all(records[n].state not in LIVE for n in records) and set(self.dropped) <= set(records)
        views = tick.plan.endpoints
        return over and tick.plan.converged and all(views[n].state == "healthy" for n in tick.spec.spec.endpoints)

    def describe(self) -> str:
        last = self.daemon._last if self.daemon is not None else None
        if last is None:
            return "never looked"
        plan = last.plan
        return (
            f"endpoints { {n: (v.state, v.reason) for n, v in plan.endpoints.items()} }; "
            f"overlays { {n: (r.state, r.reason) for n, r in plan.ledger.overlays.items()} }; "
            f"actions {[(a.op, str(a.subject), a.ready) for a in plan.actions]}; "
            f"blocked {[(str(b.subject), b.reason, b.message) for b in plan.blocked]}"
        )

    # ------------------------------------------------------------ a face of the loop: what must hold of each tick

    async def show(self, tick: Tick) -> Sequence[Event]:
        self.ticks += 1
        if self.ticks > MOST_TICKS:
            raise ViolationError(f"{MOST_TICKS} looks, and no rest: {self.describe()}")
        assert self.journal is not None
        plan, ledger = tick.plan, tick.plan.ledger
        account = Account(tick.spec.spec, tick.observed, self.journal.previous, plan)
        if plan.actions or ledger != self.journal.previous:
            account.graph_is_ordered()
            account.victims_are_lawful()
            account.floors_hold()
            account.gangs_are_whole()
            account.the_unknown_is_left_alone()
            account.only_ours_are_named()
            account.only_the_living_hold_leases()
        if any(a.op in ("start", "start_workload") for a in plan.actions):
            account.starts_wait_for_those_who_leave()
        for entry in ledger.agenda:
            if not entry.until < plan.now.wall + 30 * 24 * 3600:
                raise ViolationError(f"an agenda entry without end: {entry}")
        for name, record in ledger.endpoints.items():
            for at in record.evictions:
                if (name, at) not in self.evictions:
                    self.evictions.add((name, at))
                    self.note(f"evicted {name}")
            hour = [at for n, at in self.evictions if n == name and at > plan.now.wall - 3600]
            if len(hour) > tick.spec.spec.policy.max_evictions_per_hour and not self._clock_was_set:
                raise ViolationError(f"{name} was evicted {len(hour)} times within an hour")
        for incident in tick.incidents:
            if incident.id not in self.incidents:
                self.note(f"incident {incident.kind} {Path(incident.subject).name}")
            self.incidents[incident.id] = incident
        return ()

    async def close(self) -> None:
        pass

    @property
    def _clock_was_set(self) -> bool:
        return any(f.kind == "clock_set" for f in self.scenario.faults)

    # ------------------------------------------------------------ what breaks

    def strike(self, fault: Fault) -> None:
        """One fault begins; its end is planned with it."""
        self.catch_up()
        undo = getattr(self, f"_do_{fault.kind}")(fault)
        self.note(f"fault {fault.kind} {'' if undo is None else 'begins'}".rstrip())
        if callable(undo):

            def over() -> None:
                self.catch_up()
                undo()
                self.note(f"fault {fault.kind} is over")
                self.reschedule()
                self.wake(files=True)

            self.loop.call_later(fault.lasts, over)
        self.reschedule()
        self.wake(files=True)

    def heal(self) -> None:
        """Nothing breaks any more, and somebody sets right what waits for a person."""
        self.note("heal")
        self.kill_in = None
        if self.daemon is None or self.dead or self.daemon._last is None:
            self.loop.call_later(5.0, self.heal)
            return
        self.reset_all()
        self.loop.call_later(600.0, self.heal)  # what fell into its last state only now

    def reset_all(self) -> None:
        """Somebody looks after what was given up."""
        if self.daemon is not None and not self.dead and self.daemon._last is not None:
            ledger = self.daemon._parts.journal.ledger()
            for name in [n for n, r in ledger.endpoints.items() if r.failed] + list(ledger.quarantines):
                ledger, seen = self.daemon._parts.journal.ledger(), self.daemon._last.observed
                self.daemon._requested.note(forgiving(ledger, name, seen)[0])
            self.wake(files=True)

    def _well(self) -> list[Incarnation]:
        """Endpoints that stand as they should, and that nothing is planned for."""
        last = self.daemon._last if self.daemon is not None and not self.dead else None
        if last is None:
            return []
        planned = {e.endpoint for e in last.plan.ledger.agenda}
        healthy = {n for n, v in last.plan.endpoints.items() if v.state == "healthy"} - planned
        found = [i for i in self.plant.incarnations if i.alive and i.subject.kind == "endpoint"]
        return [i for i in found if i.subject.name in healthy and i.stop is None]

    def _living(self, kind: str) -> list[Incarnation]:
        return [i for i in self.plant.incarnations if i.alive and i.subject.kind == kind and i.phase == "running"]

    def _pick(self, fault: Fault, found: Sequence[Any]) -> Any:
        return found[fault.which % len(found)] if found else None

    def _hit(self, fault: Fault, subject: str) -> None:
        self.struck.append((fault.kind, subject, self.clock.now().wall))

    def _do_crash(self, fault: Fault) -> None:
        victim = self._pick(fault, self._well() or self._living("endpoint"))
        if victim is not None:
            if victim in self._well():
                self._hit(fault, victim.subject.name)
            self.plant.ends_at[victim.id] = (self.clock.now().mono, -9)
            self.catch_up()

    def _do_hang(self, fault: Fault) -> None:
        victim = self._pick(fault, self._well())
        if victim is not None:
            self._hit(fault, victim.subject.name)
            since = self.clock.now().mono

            def seen() -> None:
                if any(i.id == victim.id and i.alive for i in self.plant.incarnations):
                    self.plant.misses[victim.id] = (3, since)
                    self.wake()

            self.loop.call_later(HANG_SEEN_S, seen)

    def _do_job_crash(self, fault: Fault) -> None:
        victim = self._pick(fault, [i for i in self._living("workload") if i.stop is None])
        if victim is not None:
            drop = self.dropped.get(victim.subject.name)
            if drop is not None and drop.body["workload"]["retries"] == 0:
                self._hit(fault, victim.subject.name)
            self.plant.ends_at[victim.id] = (self.clock.now().mono, 1)
            self.catch_up()

    def _do_load_slow(self, _: Fault) -> Callable[[], None]:
        before = self.plant.behaviour.load_s
        self.plant.behaviour.load_s = 400.0
        return lambda: setattr(self.plant.behaviour, "load_s", before)

    def _do_load_fails(self, fault: Fault) -> Callable[[], None] | None:
        victim = self._pick(fault, self._well())
        if victim is None:
            return None
        name = victim.subject.name
        self._hit(fault, name)
        self.plant.behaviour.crashes |= {name}
        self.plant.ends_at[victim.id] = (self.clock.now().mono, 1)
        self.catch_up()

        def over() -> None:
            self.plant.behaviour.crashes -= {name}

        return over

    def _do_stop_slow(self, _: Fault) -> Callable[[], None]:
        before = self.plant.behaviour.stop_s
        self.plant.behaviour.stop_s = 120.0
        return lambda: setattr(self.plant.behaviour, "stop_s", before)

    def _do_unkillable(self, fault: Fault) -> Callable[[], None] | None:
        victim = self._pick(fault, self._living("endpoint"))
        if victim is None:
            return None
        self.unkillable.add(victim.subject.name)
        return lambda: self.unkillable.discard(victim.subject.name)

    def _do_memory_late(self, _: Fault) -> Callable[[], None]:
        before = self.plant.behaviour.memory_return_s
        self.plant.behaviour.memory_return_s = 90.0
        return lambda: setattr(self.plant.behaviour, "memory_return_s", before)

    def _do_driver_down(self, _: Fault) -> Callable[[], None]:
        self.driver_down = True
        return lambda: setattr(self, "driver_down", False)

    def _gpu_is(self, fault: Fault, state: str) -> Callable[[], None]:
        index = fault.which % self.scenario.gpus
        self.plant.overrides[index] = {"state": state, "detail": "as drawn"}
        return lambda: self.plant.overrides.pop(index, None)  # type: ignore[return-value]

    def _do_gpu_unknown(self, fault: Fault) -> Callable[[], None]:
        return self._gpu_is(fault, "unknown")

    def _do_gpu_lost(self, fault: Fault) -> Callable[[], None]:
        self._hit(fault, uuid(fault.which % self.scenario.gpus))
        return self._gpu_is(fault, "lost")

    def _do_foreign(self, fault: Fault) -> Callable[[], None]:
        index = fault.which % self.scenario.gpus
        self.plant.foreign[index] = [foreign(900 + index, FOREIGN_GIB * GIB)]
        return lambda: self.plant.foreign.pop(index, None)  # type: ignore[return-value]

    def _do_port_taken(self, fault: Fault) -> Callable[[], None]:
        port = 8000 + fault.which % len(self.scenario.endpoints)
        self.plant.ports[port] = PortHolder(port, 777, "nginx")
        return lambda: self.plant.ports.pop(port, None)  # type: ignore[return-value]

    def _do_identity_unknown(self, fault: Fault) -> Callable[[], None] | None:
        victim = self._pick(fault, [*self._living("endpoint"), *self._living("workload")])
        if victim is None:
            return None
        self.unknown.add(victim.id)
        return lambda: self.unknown.discard(victim.id)

    def _do_setpoints_torn(self, _: Fault) -> Callable[[], None]:
        put(self.setpoints, self.whole[: len(self.whole) // 2])
        return lambda: put(self.setpoints, self.whole)

    def _do_overlay_torn(self, fault: Fault) -> Callable[[], None] | None:
        drop = self._pick(fault, sorted(self.dropped.values(), key=lambda d: d.name))
        if drop is None or not self.overlays.is_dir():
            return None
        name, text = drop.name, json.dumps(drop.body)
        put(self.overlays / f"{name}.yaml", text[:-20])

        def mended() -> None:
            folder = self.overlays if self.overlays.is_dir() else self.overlays.with_name("away")
            if name in self.dropped:
                put(folder / f"{name}.yaml", text)

        return mended

    def _do_overlay_removed(self, fault: Fault) -> None:
        drop = self._pick(fault, sorted(self.dropped.values(), key=lambda d: d.name))
        if drop is not None and self.overlays.is_dir():
            self.note(f"removed {drop.name}")
            del self.dropped[drop.name]
            (self.overlays / f"{drop.name}.yaml").unlink(missing_ok=True)

    def _do_folder_gone(self, _: Fault) -> Callable[[], None] | None:
        away = self.overlays.with_name("away")
        if away.exists():
            return None
        self.overlays.rename(away)

        return lambda: away.rename(self.overlays)  # type: ignore[return-value]

    def _do_clock_set(self, fault: Fault) -> None:
        self.clock.set_wall(fault.lasts)

    def _do_kill(self, fault: Fault) -> None:
        self.kill_in = int(fault.lasts)

    def _do_disk_full(self, _: Fault) -> Callable[[], None]:
        self.disk_full = True
        return lambda: setattr(self, "disk_full", False)

    def _nap_meets(self, kind: str) -> Callable[[], None]:
        self.nap_faults.add(kind)
        return lambda: self.nap_faults.discard(kind)

    def _do_sleep_fails(self, _: Fault) -> Callable[[], None]:
        return self._nap_meets("sleep_fails")

    def _do_sleep_keeps(self, _: Fault) -> Callable[[], None]:
        return self._nap_meets("sleep_keeps")

    def _do_wake_fails(self, _: Fault) -> Callable[[], None]:
        return self._nap_meets("wake_fails")

    def _do_wake_dies(self, _: Fault) -> Callable[[], None]:
        return self._nap_meets("wake_dies")

    def _do_call_slow(self, _: Fault) -> Callable[[], None]:
        return self._nap_meets("call_slow")

    def _do_look_slow(self, _: Fault) -> Callable[[], None]:
        self.look_s = 3.0
        return lambda: setattr(self, "look_s", 0.0)

    # ------------------------------------------------------------ engines that sleep and wake up

    def tell(self, target: Incarnation, what: str) -> None:
        """An engine begins to do what it was told, unless it does already."""
        if target.id in self.calls:
            return
        for other in self.plant.incarnations:
            if other.id in self.calls and self.calls[other.id][0] != what and set(other.gpus) & set(target.gpus):
                self.never(f"{target.id} is told to {what} while {other.id} does the other on one GPU")
        behaviour = self.plant.behaviour
        takes = behaviour.sleep_s if what == "sleep" else behaviour.wake_s
        answered: asyncio.Future[str | None] = self.loop.create_future()
        self.calls[target.id] = (what, answered)
        self.note(f"told to {what} {target.id}")
        self.loop.call_later(
            takes * (100 if "call_slow" in self.nap_faults else 1), self._did, target.id, what, answered
        )

    def _did(self, name: str, what: str, answered: asyncio.Future[str | None]) -> None:
        del self.calls[name]
        self.catch_up()
        target = next((i for i in self.plant.incarnations if i.id == name and i.alive), None)
        problem: str | None = None
        if target is None:
            problem = "the connection was lost"
        elif f"{what}_fails" in self.nap_faults:
            problem = f"POST answered 500: it cannot {what}"
        elif what == "sleep":
            self.plant.asleep.add(name)
            if "sleep_keeps" in self.nap_faults:
                self.plant.keeping.add(name)
        elif "wake_dies" in self.nap_faults or not self._has_room(target):
            self.plant.ends_at[name] = (self.clock.now().mono, 0)  # as vLLM does: out of memory, exit code 0
            problem = "the connection was lost"
        else:
            self.plant.asleep.discard(name)
            self.plant.keeping.discard(name)
        self.note(f"did {what} {name} {'not' if problem else ''}".rstrip())
        self.reschedule()
        if not answered.done():
            answered.set_result(problem)

    def _has_room(self, target: Incarnation) -> bool:
        for gpu, size in zip(target.gpus, target.memory_bytes, strict=True):
            seen = self.plant._gpu(next(i for i in range(len(self.plant.totals)) if uuid(i) == gpu))
            if seen.used_bytes is not None and seen.used_bytes + size - self.plant.residue > seen.total_bytes:
                return False
        return True

    # ------------------------------------------------------------ lawful stops

    def check_stop(self, target: Incarnation) -> None:
        """Work that began completes, unless its file is gone or it may be displaced."""
        if target.id in self.unknown:
            self.never(f"{target.id} is to be signalled, and nobody could verify whose it is")
        if target.subject.kind == "workload":
            drop = self.dropped.get(target.subject.name)
            if drop is not None and not drop.body["workload"]["preemptible"]:
                self.never(f"the work of {target.subject.name} is stopped, and nobody asked for that")


class SimActor:
    """`ProcessActor`, on the plant."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def warm(self) -> None:
        pass

    async def ensure_started(self, launch: Launch) -> None:
        box, plant = self.box, self.box.plant
        box.boundary("before an intent")
        box.catch_up()
        alive = [i for i in plant.incarnations if i.alive and i.subject == launch.subject]
        if alive:
            self.box.never(f"{launch.subject} is started beside {alive[0].id}")
        if launch.port in plant.ports:
            raise PortInUse(f"port {launch.port} is taken")
        self._check_room(launch)
        made = Incarnation(
            id=launch.incarnation, subject=launch.subject, process_hash=launch.process_hash, gpus=launch.gpus,
            memory_bytes=launch.memory_bytes, exclusive=launch.exclusive, port=launch.port, started=box.clock.now(),
            phase="running", pid=10_000 + box._serial, strays=(), exit_code=None, exited=None, attempt=launch.attempt,
        )  # fmt: skip
        stillborn = replace(made, phase="vanished", pid=None, exited=made.started)
        plant.incarnations.append(stillborn)
        box.boundary("between an intent and its process")
        plant.incarnations = [made if i.id == made.id else i for i in plant.incarnations]
        box.note(f"started {launch.subject} on {','.join(launch.gpus)}")
        now, behaviour = box.clock.now().mono, plant.behaviour
        if launch.subject.kind == "workload":
            self._begin_work(launch, now)
        elif launch.subject.name in behaviour.crashes:
            plant.ends_at[made.id] = (now + min(5.0, behaviour.load_s), 1)
        else:
            plant.ready_at[made.id] = now + behaviour.load_s
        box.reschedule()
        box.boundary("after a start")
        await asyncio.sleep(0.02)

    def _begin_work(self, launch: Launch, now: float) -> None:
        box, behaviour, name = self.box, self.box.plant.behaviour, launch.subject.name
        box.work_starts[name] += 1
        drop = next(d for d in box.scenario.drops if d.name == name)
        most = 1 + drop.body["workload"]["retries"]
        if box.work_starts[name] > most and not drop.body["workload"]["preemptible"]:
            self.box.never(f"the work of {name} began {box.work_starts[name]} times, and {most} are allowed")
        code = drop.codes[min(launch.attempt, len(drop.codes) - 1)]
        box.plant.ends_at[launch.incarnation] = (now + behaviour.run_s[name], code)

    def _check_room(self, launch: Launch) -> None:
        """At the moment of a start its GPUs really have the room; an exclusive one is nobody else's."""
        plant = self.box.plant
        if self.box.driver_down:
            self.box.never(f"{launch.subject} is started while the driver does not answer")
        for gpu, size in zip(launch.gpus, launch.memory_bytes, strict=True):
            index = next(i for i in range(len(plant.totals)) if uuid(i) == gpu)
            seen = plant._gpu(index)
            if seen.state != "ok":
                self.box.never(f"{launch.subject} is started on GPU {index}, which is {seen.state}")
            if (seen.used_bytes or 0) + size > seen.total_bytes:
                self.box.never(f"{launch.subject} does not fit on GPU {index}: {seen.used_bytes} in use")
            beside = [i for i in plant.incarnations if i.alive and gpu in i.gpus]
            if beside and (launch.exclusive or any(i.exclusive and i.id not in plant.asleep for i in beside)):
                self.box.never(f"{launch.subject} shares GPU {index} with {beside[0].subject}, and one wants it whole")

    async def ensure_drain_requested(self, incarnation: str) -> None:
        self.box.boundary("before a drain")
        target = self._target(incarnation)
        if target is not None and target.stop is None:
            self.box.check_stop(target)
            self._change(incarnation, stop=StopProgress(self.box.clock.now(), drained=False, signalled=None))

    async def ensure_stopped(self, incarnation: str, stop: Stop) -> None:
        await self._end(incarnation, stop.grace_s)

    async def ensure_killed(self, incarnation: str) -> None:
        await self._end(incarnation, 0.0)

    async def _end(self, incarnation: str, grace_s: float) -> None:
        box = self.box
        box.boundary("before a stop is recorded")
        box.catch_up()
        target = self._target(incarnation)
        if target is None:
            return
        box.check_stop(target)
        now = box.clock.now()
        signalled = target.stop.signalled if target.stop else None
        if signalled is None:
            signalled = now
            requested = target.stop.requested if target.stop else now
            self._change(incarnation, stop=StopProgress(requested, drained=True, signalled=now))
            box.boundary("between a stop's record and its signal")
            box.note(f"signalled {incarnation}")
            if target.subject.name not in box.unkillable:
                self._ends_at(incarnation, now.mono + box.plant.behaviour.stop_s, 0 if target.port else -15)
        ended = box._ends.setdefault(incarnation, asyncio.Event())
        left = max(0.0, signalled.mono + grace_s - box.clock.now().mono)
        try:
            async with asyncio.timeout(left):
                await ended.wait()
        except TimeoutError:
            box.boundary("before SIGKILL")
            box.note(f"killed {incarnation}")
            self._ends_at(incarnation, box.clock.now().mono, -9)
            box.catch_up()
            try:
                async with asyncio.timeout(10.0):
                    await ended.wait()
            except TimeoutError:
                raise ActError(f"{incarnation} does not end") from None
        box.boundary("after a stop")

    def _ends_at(self, incarnation: str, at: float, code: int) -> None:
        before = self.box.plant.ends_at.get(incarnation)
        if before is None or at < before[0]:
            self.box.plant.ends_at[incarnation] = (at, code)
        self.box.reschedule()

    def _target(self, incarnation: str) -> Incarnation | None:
        return next((i for i in self.box.plant.incarnations if i.id == incarnation and i.alive), None)

    def _change(self, incarnation: str, **fields: Any) -> None:
        self.box.plant._change(incarnation, lambda i: replace(i, **fields))


class SimEngines:
    """`EngineActor`, on the plant. What an engine was told it does, whether or not who told it lives on."""

    def __init__(self, box: Box) -> None:
        self.box = box

    async def ensure(self, order: Order, owns: object, *, timeout_s: float) -> None:
        box, what = self.box, "sleep" if order.asleep else "wake"
        box.boundary(f"before a {what}")
        box.catch_up()
        target = next((i for i in box.plant.incarnations if i.id == order.incarnation and i.alive), None)
        if target is None or order.incarnation in box.unknown:
            raise NotOurs(f"{order.incarnation} is not seen to listen")
        if (order.incarnation in box.plant.asleep) == order.asleep and order.incarnation not in box.calls:
            return
        box.tell(target, what)
        answered = box.calls[order.incarnation][1]
        try:
            async with asyncio.timeout(timeout_s):
                problem = await asyncio.shield(answered)
        except TimeoutError:
            problem = "it did not answer"
        box.boundary(f"after a {what}")
        if problem is not None:
            raise ActError(problem)


class SimEyes:
    """Looks at the plant as the observer looks at a machine."""

    def __init__(self, box: Box) -> None:
        self.box = box

    def observe(self, spec: Spec, options: ObserveOptions) -> Observed:
        box = self.box
        box.catch_up()
        seen = box.plant.observe()
        now = box.clock.now()
        ahead, before = now.wall - now.mono, box._ahead
        box._ahead = ahead
        found = tuple(
            replace(i, phase="unknown", strays=None) if i.id in box.unknown and i.alive else i
            for i in seen.incarnations
        )
        seen = replace(seen, incarnations=found, clock_jumped=before is not None and abs(ahead - before) > CLOCK_JUMP_S)
        if box.driver_down:
            dark = tuple(replace(g, state="unknown", used_bytes=None, processes=None) for g in seen.gpus)
            seen = replace(seen, gpus=dark, gpus_known=False, gpus_detail="the driver does not answer")
        if box.look_s:
            box.loop._pass(box.look_s)  # what is seen is old by the time it is decided on
        return seen

    def watches(self) -> Mapping[int, str]:
        return {}

    def probe_now(self, incarnations: Collection[str]) -> None:
        self.box.loop.call_later(0.01, self.box.wake)

    def owns_listener(self, incarnation: str, port: int) -> bool | None:
        return True

    def close(self) -> None:
        pass


def forget(box: Box) -> Callable[..., None]:
    """What putting an ended incarnation away is here; a daemon can die in front of it."""

    def archive(_state: StateDir, incarnation: str, *, keep: int) -> None:
        box.boundary("before an incarnation is put away")
        box.plant.incarnations = [i for i in box.plant.incarnations if i.id != incarnation]

    return archive


@lru_cache(maxsize=64)
def _resolved(setpoints: SourceText, overlays: tuple[SourceText, ...]) -> Spec:
    return resolve_texts(setpoints, overlays)


class Patches:
    """The names that the loop looks up and a simulation gives: who is put away how, and how starts are called.

    And the same texts are resolved once: what they mean hangs on nothing else, as there are no files of secrets here.
    """

    def __init__(self, box: Box) -> None:
        self.box = box

    def __enter__(self) -> None:
        self.before = aftermath.archive, launching.new_id
        aftermath.archive = forget(self.box)  # type: ignore[attr-defined]
        launching.new_id = self._name  # type: ignore[attr-defined]
        specs.resolve_texts = lambda setpoints, overlays: _resolved(setpoints, tuple(overlays))

    def _name(self, boot_id: str) -> str:
        self.box._serial += 1
        return f"i{self.box._serial:05d}"

    def __exit__(self, *_: object) -> None:
        aftermath.archive, launching.new_id = self.before  # type: ignore[attr-defined]
        specs.resolve_texts = resolve_texts


def new_loop() -> VirtualLoop:
    """A loop at the moment at which every story begins."""
    return VirtualLoop(NOW)


__all__ = ["Box", "Patches", "ViolationError", "new_loop"]

"""A pure stand-in for the box and the loop: it carries out a plan's ready actions on a virtual clock.

It does what the real loop does and no more: the ledger of a plan is kept before its actions run, only ready actions
with effects run, ended incarnations are dropped once the plan archives them, and what happens in between comes from
the passing of time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from builders import NOW, gpu, uuid
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import WAITS, Action, Plan
from reconciler.plan.ledger import Ledger
from reconciler.plan.naps import called
from reconciler.plan.observed import (
    Gpu,
    GpuProcess,
    Incarnation,
    Observed,
    Obstacle,
    PortHolder,
    Probe,
    StopProgress,
    Subject,
)
from reconciler.plan.planner import plan
from reconciler.plan.situation import Situation
from reconciler.spec.spec import Questions, Spec
from reconciler.units import GIB


@dataclass
class Behaviour:
    """How processes behave; seconds."""

    load_s: float = 40.0
    sleep_s: float = 3.0
    wake_s: float = 2.0
    failing: frozenset[str] = frozenset()
    """Calls that engines refuse: `sleep`, `wake`."""
    stop_s: float = 2.0
    memory_return_s: float = 1.0
    run_s: Mapping[str, float] = field(default_factory=dict)
    """By overlay; how long its work takes. Default: `default_run_s`."""
    default_run_s: float = 300.0
    exit_codes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By overlay, one for each attempt; the last one repeats. Default: 0."""
    unstarted: dict[str, int] = field(default_factory=dict)
    """By overlay: so many starts are cut short before anything runs."""
    crashes: frozenset[str] = frozenset()
    """Endpoints that end with exit code 1 where they would have become ready."""


@dataclass
class Plant:
    """The state of the simulated box."""

    totals: list[int] = field(default_factory=lambda: [80 * GIB] * 4)
    now: Instant = NOW
    behaviour: Behaviour = field(default_factory=Behaviour)
    incarnations: list[Incarnation] = field(default_factory=list)
    ready_at: dict[str, float] = field(default_factory=dict)
    """Incarnation → monotonic second at which it answers; never: not there."""
    misses: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Incarnation → misses in a row, failing since."""
    ends_at: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Incarnation → monotonic second of its end, and its exit code."""
    frees_at: dict[str, float] = field(default_factory=dict)
    """Ended incarnation → monotonic second at which its memory is free again."""
    foreign: dict[int, list[GpuProcess]] = field(default_factory=dict)
    overrides: dict[int, dict[str, object]] = field(default_factory=dict)
    """GPU index → fields of `Gpu` that are as they are: state, healthy, detail."""
    ports: dict[int, PortHolder] = field(default_factory=dict)
    numa: dict[int, int] = field(default_factory=dict)
    islands: dict[int, int] = field(default_factory=dict)
    """GPU index -> NVLink island."""
    busy: dict[str, int] = field(default_factory=dict)
    """Incarnation → requests in flight; 0 if not there."""
    frozen: dict[str, float] = field(default_factory=dict)
    """Incarnation → monotonic second since when its counter of work stands still with requests running."""
    nameless: frozenset[str] = frozenset()
    """Incarnations whose memory NVML names no process for."""
    begun: list[float] = field(default_factory=list)
    """Epoch seconds of the starts of work, in order."""
    history: list[Action] = field(default_factory=list)
    """Every action carried out, in order."""
    serial: int = 0
    asleep: set[str] = field(default_factory=set)
    """Incarnations that sleep; they hold `residue` on each GPU."""
    residue: int = GIB
    keeping: set[str] = field(default_factory=set)
    """Incarnations that say that they sleep, and hold all that they held."""
    called: dict[str, tuple[float, Action]] = field(default_factory=dict)
    """Incarnation → the call that its engine is busy with, and when it answers."""
    answered: list[Action] = field(default_factory=list)
    """Calls that returned, until somebody takes them."""
    host_bytes: int | None = 256 * GIB
    obstacles: dict[str, Obstacle] = field(default_factory=dict)
    """By process_hash or placement_hash: what cannot be started."""
    boot: str = "boot"

    # ------------------------------------------------------------ looking

    def observe(self) -> Observed:
        """What the box shows now."""
        gpus = tuple(self._gpu(index) for index in range(len(self.totals)))
        found = tuple(sorted(self.incarnations, key=lambda i: (i.subject, i.started.wall, i.id)))
        probes = {i.id: self._probe(i) for i in found if i.phase == "running" and i.port is not None}
        return Observed(
            self.now, self.boot, gpus, found, probes, dict(self.ports),
            host_available_bytes=self.host_bytes, obstacles=dict(self.obstacles),
        )  # fmt: skip

    def _gpu(self, index: int) -> Gpu:
        here = [
            (i, self.residue if i.id in self.asleep - self.keeping else i.memory_bytes[i.gpus.index(uuid(index))])
            for i in self.incarnations
            if uuid(index) in i.gpus
        ]
        living = [(i, size) for i, size in here if i.alive]
        lingering = sum(size for i, size in here if i.id in self.frees_at)
        processes = [
            GpuProcess(i.pid or 0, size, i.subject, None, None) for i, size in living if i.id not in self.nameless
        ]
        strangers = self.foreign.get(index, [])
        used = sum(size for _, size in living) + lingering + sum(p.memory_bytes or 0 for p in strangers)
        seen = gpu(
            index, total=self.totals[index], used=used, processes=(*processes, *strangers), at=self.now,
            numa_node=self.numa.get(index), nvlink_island=self.islands.get(index),
        )  # fmt: skip
        fields = self.overrides.get(index, {})
        if fields.get("state") in ("unknown", "lost"):
            seen = replace(seen, used_bytes=None, processes=None)
        return replace(seen, **fields)  # type: ignore[arg-type]

    def _probe(self, of: Incarnation) -> Probe:
        at = self.ready_at.get(of.id)
        misses, since = self.misses.get(of.id, (0, 0.0))
        if misses:
            failing = Instant(self.now.wall - (self.now.mono - since), since)
            return Probe(of.id, self.now, False, misses, failing, None, None, detail="connection refused")
        answers = at is not None and self.now.mono >= at
        sleeping = of.id in self.asleep if answers else None
        told = Probe(
            of.id, self.now, answers, 0, None, self.now if answers else None, self.busy.get(of.id, 0), sleeping
        )
        since = self.frozen.get(of.id)
        moved = None if since is None else self.now.plus(since - self.now.mono)
        return replace(told, moved=moved, progress_at=self.now)

    # ------------------------------------------------------------ acting

    def act(self, decided: Plan) -> list[Action]:
        """Carry out every ready action with an effect; returns those that changed something."""
        self.incarnations = [i for i in self.incarnations if i.id not in decided.archive]
        done = [a for a in decided.actions if a.ready and a.op not in WAITS and self._carry_out(a)]
        self.history += done
        return done

    def _carry_out(self, action: Action) -> bool:
        match action.op:
            case "start" | "start_workload":
                return self._start(action)
            case "drain":
                return action.incarnation is not None and self._ask_to_stop(action, signal=False)
            case "stop" | "stop_workload":
                return self._ask_to_stop(action, signal=True)
            case "kill":
                return self._change(action.incarnation, lambda i: replace(i, strays=()))
            case "sleep" | "wake":
                return self._call(action)
            case _:
                raise AssertionError(f"the plant cannot {action.op}")

    def _call(self, action: Action) -> bool:
        name = action.incarnation or ""
        if name in self.called:
            return False
        at = self.now.mono + (self.behaviour.sleep_s if action.op == "sleep" else self.behaviour.wake_s)
        self.called[name] = (at, action)
        return True

    def _start(self, action: Action) -> bool:
        if any(i.subject == action.subject and i.alive for i in self.incarnations):
            return False
        self.serial += 1
        name = f"{action.subject.name}-{self.serial}"
        port = self._port_of.get(action.subject.name) if action.subject.kind == "endpoint" else None
        self.incarnations.append(
            Incarnation(
                id=name, subject=action.subject, process_hash=action.process_hash, gpus=action.gpus,
                memory_bytes=action.memory_bytes, exclusive=action.exclusive, port=port, started=self.now,
                phase="running", pid=10_000 + self.serial, strays=(), exit_code=None, exited=None,
                attempt=action.attempt, questions=self._questions_of.get(action.subject.name),
            )
        )  # fmt: skip
        behaviour = self.behaviour
        if action.op == "start_workload":
            if behaviour.unstarted.get(action.subject.name, 0) > action.attempt:
                self._change(name, lambda i: replace(i, phase="vanished", pid=None))
                return True
            self.begun.append(self.now.wall)
            codes = behaviour.exit_codes.get(action.subject.name, (0,))
            code = codes[min(action.attempt, len(codes) - 1)]
            run = behaviour.run_s.get(action.subject.name, behaviour.default_run_s)
            self.ends_at[name] = (self.now.mono + run, code)
        elif action.subject.name in behaviour.crashes:
            self.ends_at[name] = (self.now.mono + behaviour.load_s, 1)
        else:
            self.ready_at[name] = self.now.mono + behaviour.load_s
        return True

    _port_of: dict[str, int] = field(default_factory=dict)
    _questions_of: dict[str, Questions] = field(default_factory=dict)

    def _ask_to_stop(self, action: Action, *, signal: bool) -> bool:
        target = next((i for i in self.incarnations if i.id == action.incarnation), None)
        assert target is not None, f"{action.op} of {action.incarnation}, which does not exist"
        before = target.stop or StopProgress(self.now, drained=False, signalled=None)
        if signal and before.signalled is None:
            self.ends_at[target.id] = (self.now.mono + self.behaviour.stop_s, 0 if target.port else -15)
            before = replace(before, drained=True, signalled=self.now)
        return self._change(target.id, lambda i: replace(i, stop=before))

    def _change(self, name: str | None, change: Callable[[Incarnation], Incarnation]) -> bool:
        before = list(self.incarnations)
        self.incarnations = [change(i) if i.id == name else i for i in before]
        return before != self.incarnations

    # ------------------------------------------------------------ time

    def next_event(self) -> float | None:
        """The next moment after now at which something happens by itself, in monotonic seconds."""
        moments = [*self.ready_at.values(), *self.frees_at.values(), *(at for at, _ in self.ends_at.values())]
        moments += [at for at, _ in self.called.values()]
        return min((m for m in moments if m > self.now.mono), default=None)

    def advance(self, seconds: float) -> None:
        """Let time pass, and with it what is due."""
        self.now = self.now.plus(seconds)
        for name, (at, code) in list(self.ends_at.items()):
            if at <= self.now.mono:
                del self.ends_at[name]
                self.end(name, code)
        self.frees_at = {n: at for n, at in self.frees_at.items() if at > self.now.mono}
        for name, (at, action) in list(self.called.items()):
            if at <= self.now.mono:
                del self.called[name]
                self.answered.append(action)
                if action.op not in self.behaviour.failing:
                    (self.asleep.add if action.op == "sleep" else self.asleep.discard)(name)

    def end(self, name: str, code: int) -> None:
        """One incarnation ends now; its memory comes back a little later."""
        ended = {"phase": "exited", "exit_code": code, "exited": self.now, "pid": None}
        self._change(name, lambda i: replace(i, **ended))  # type: ignore[arg-type]
        self.ready_at.pop(name, None)
        self.frees_at[name] = self.now.mono + self.behaviour.memory_return_s

    def reboot(self, off_s: float, *, recorded: bool = True) -> None:
        """Everything ends, the box is off for so long, and another boot begins, with a monotonic clock of its own."""
        went_down, self.boot = self.now, f"{self.boot}'"
        for each in list(self.incarnations):
            started = Instant(each.started.wall, each.started.mono - went_down.mono)
            exited = each.exited and Instant(each.exited.wall, each.exited.mono - went_down.mono)
            ends: dict[str, object] = {}
            if each.alive:
                exited = Instant(went_down.wall, 0.0) if recorded else None
                ends = {
                    "phase": "exited" if recorded else "vanished",
                    "exit_code": -15 if recorded else None,
                    "pid": None,
                }
            fields = {**ends, "started": started, "exited": exited, "strays": (), "bygone": True}
            self._change(each.id, lambda i, fields=fields: replace(i, **fields))  # type: ignore[misc]
        for gone in (self.ready_at, self.ends_at, self.frees_at, self.asleep, self.called, self.misses, self.frozen):
            gone.clear()
        self.now = Instant(went_down.wall + off_s, 20.0)

    def current(self, name: str, kind: str = "endpoint") -> Incarnation | None:
        """The living incarnation of an endpoint or workload."""
        return next((i for i in self.incarnations if i.subject == Subject(kind, name) and i.alive), None)  # type: ignore[arg-type]

    def is_ready(self, name: str) -> bool:
        """Whether an endpoint answers now."""
        found = self.current(name)
        return found is not None and bool(self._probe(found).ready)


@dataclass
class Run:
    """A plant under a planner: one look, one decision, one step, over and over."""

    spec: Spec
    plant: Plant
    ledger: Ledger = field(default_factory=Ledger)
    watch: Callable[[Run, Plan], None] = lambda _run, _plan: None
    """Sees every decision before it is carried out."""
    steps: int = 0

    def situation(self) -> Situation:
        """What a decision of this moment goes by."""
        return Situation(self.spec, self.plant.observe(), self.ledger, self.plant.now)

    def decide(self) -> Plan:
        """The plan for this moment."""
        known = [*self.spec.endpoints.values(), *(e for o in self.spec.overlays.values() for e in o.endpoints.values())]
        self.plant._port_of = {e.name: e.port for e in known if e.port is not None}
        self.plant._questions_of |= {e.name: e.questions for e in known}
        return plan(self.spec, self.plant.observe(), self.ledger, self.plant.now)

    def step(self) -> tuple[Plan, bool]:
        """Decide and act once; whether anything was done or remembered."""
        for action in self.plant.answered:
            problem = "POST answered 500" if action.op in self.plant.behaviour.failing else None
            self.ledger, _ = called(self.ledger, action, problem, self.plant.now)
        self.plant.answered = []
        decided = self.decide()
        self.watch(self, decided)
        self.steps += 1
        moved = decided.ledger != self.ledger or bool(decided.archive)
        self.ledger = decided.ledger
        return decided, bool(self.plant.act(decided)) or moved

    def settle(self, *, until: Callable[[Plan], bool] | None = None, max_steps: int = 400) -> Plan:
        """Step until nothing happens any more by action or by time (or `until` holds of a decision)."""
        for _ in range(max_steps):
            decided, acted = self.step()
            if until is not None and until(decided):
                return decided
            if acted:
                continue
            event = self.plant.next_event()
            waits = [m for m in (event, decided.next_wake.mono if decided.next_wake else None) if m is not None]
            if not waits:
                return decided
            self.plant.advance(max(0.001, min(waits) - self.plant.now.mono))
        raise AssertionError(f"no fixed point within {max_steps} steps: {describe(decided)}")

    def die_after(self, decisions: int) -> None:
        """Carry out so many decisions; of the next one nothing is done, and all that is left is what is remembered."""
        for _ in range(decisions):
            _, acted = self.step()
            if not acted:
                self.plant.advance(1.0)
        self.ledger = self.decide().ledger

    def starts(self) -> list[str]:
        """Names of what was started, in order."""
        return [a.subject.name for a in self.plant.history if a.op in ("start", "start_workload")]

    def stops(self) -> list[str]:
        """Names of what was stopped, in order."""
        return [a.subject.name for a in self.plant.history if a.op in ("stop", "stop_workload", "kill")]


def describe(decided: Plan) -> str:
    """A plan in a few words, for failures."""
    actions = [f"#{a.id} {a.op} {a.subject} needs {a.needs} ready {a.ready}" for a in decided.actions]
    overlays = {n: (r.state, r.reason) for n, r in decided.ledger.overlays.items()}
    return f"{actions} blocked {[(str(b.subject), b.reason) for b in decided.blocked]} overlays {overlays}"


def overlay_state(name: str, *states: str) -> Callable[[Plan], bool]:
    """Holds once an overlay is in one of these states."""
    return lambda decided: decided.ledger.overlays[name].state in states


def names(items: Iterable[Action]) -> list[str]:
    """`op subject` of each action."""
    return [f"{a.op} {a.subject}" for a in items]

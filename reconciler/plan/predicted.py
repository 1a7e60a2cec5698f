"""A box on which everything takes as long as predicted and goes well: what a forecast decides upon.

It is what the planner would see from now on: the actions of each plan are carried out on it, time passes, and nothing
else happens. What is unknown now stays unknown, and strangers stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.plan.actions import WAITS, Action, Plan
from reconciler.plan.departures import stop_for
from reconciler.plan.ledger import Ledger
from reconciler.plan.naps import called
from reconciler.plan.observed import Gpu, GpuProcess, Incarnation, Observed, Probe, StopProgress
from reconciler.plan.overlays import MEMORY_RETURN_S, WORKLOAD_STOP_S, predicted_end
from reconciler.plan.situation import Situation
from reconciler.spec.spec import EndpointSpec, Spec

SHORTEST_S = 0.01
"""Whatever should have happened already happens this soon."""
FIRST_PID = 1 << 22
"""Above every pid that Linux gives away, so that a predicted process is never taken for a real one."""


class PredictedBox:
    """The box, from what was observed on."""

    def __init__(self, spec: Spec, observed: Observed, ledger: Ledger, now: Instant) -> None:
        self.now = now
        self.incarnations: list[Incarnation] = []
        self._spec, self._first = spec, observed
        self._runs = ledger.runs
        self._situation = Situation(spec, observed, ledger, now)
        self._ready_at: dict[str, float] = {}
        """Incarnation → monotonic second from which it answers."""
        self._ends_at: dict[str, tuple[float, int]] = {}
        """Incarnation → monotonic second of its end, and its exit code."""
        self._frees_at: dict[str, float] = {}
        """Ended incarnation → monotonic second at which its memory is back."""
        self._drained_at: dict[str, float] = {}
        self._asleep: set[str] = set()
        self._calls: dict[str, tuple[float, Action]] = {}
        self._answered: list[Action] = []
        self._serial = 0
        for found in observed.incarnations:
            self.incarnations.append(self._taken_over(found, ledger))

    def _taken_over(self, found: Incarnation, ledger: Ledger) -> Incarnation:
        """What is to be expected of an incarnation that exists now."""
        soon = self.now.mono + SHORTEST_S
        if not found.alive:
            self._frees_at[found.id] = self.now.mono + MEMORY_RETURN_S
            return found
        if found.phase == "intent":
            found = replace(found, phase="running", pid=self._pid(), strays=())
        if found.stop is not None and found.stop.signalled is not None:
            self._ends_at[found.id] = (soon + self._stop_s(found), -15)
            return found
        probe = self._situation.probe(found)
        if found.subject.kind == "workload":
            overlay, record = self._spec.overlays.get(found.subject.name), ledger.overlays.get(found.subject.name)
            if overlay is not None and record is not None:
                usual = ledger.runs.get(record.name)
                left = predicted_end(record, overlay.makespan, self.now.wall, usual) - self.now.wall
                self._ends_at[found.id] = (max(soon, self.now.mono + left), 0)
        elif probe is not None and probe.sleeping:
            self._asleep.add(found.id)
            self._ready_at[found.id] = self.now.mono
        elif probe is not None and probe.ready:
            self._ready_at[found.id] = self.now.mono
        elif probe is None or not probe.misses:
            self._ready_at[found.id] = max(soon, found.started.mono + self._load_s(found.subject.name))
        return found

    # ------------------------------------------------------------ looking

    def observe(self) -> Observed:
        """What it shows now."""
        gpus = tuple(self._gpu(gpu) for gpu in self._first.gpus)
        probes = {i.id: self._probe(i) for i in self.incarnations if i.alive and i.port is not None}
        found = tuple(sorted(self.incarnations, key=lambda i: (i.subject, i.started.wall, i.id)))
        return replace(self._first, at=self.now, gpus=gpus, incarnations=found, probes=probes, clock_jumped=False)

    def _gpu(self, gpu: Gpu) -> Gpu:
        if gpu.used_bytes is None:
            return replace(gpu, at=self.now)
        processes = [p for p in gpu.processes or () if p.owner is None]
        used = self._situation.rooms[gpu.uuid].foreign_bytes
        for one in self.incarnations:
            if gpu.uuid not in one.gpus:
                continue
            planned = one.memory_bytes[one.gpus.index(gpu.uuid)]
            size = min(planned, self._residue(one)) if one.id in self._asleep else planned
            if one.alive:
                processes.append(GpuProcess(one.pid or 0, size, one.subject, None, None))
                used += size
            elif one.id in self._frees_at:
                used += planned
        return replace(gpu, used_bytes=min(used, gpu.total_bytes), processes=tuple(processes), at=self.now)

    def _probe(self, of: Incarnation) -> Probe:
        at = self._ready_at.get(of.id, inf)
        if at == inf:  # it fails, and nothing says that this will end by itself
            seen = self._situation.probe(of)
            return replace(seen, at=self.now) if seen is not None else Probe(of.id, self.now, None, 0, None, None)
        if self.now.mono < at:
            return Probe(of.id, self.now, ready=False, misses=0, failing_since=None, ready_since=None)
        busy = int(self.now.mono < self._drained_at.get(of.id, self.now.mono))
        sleeping = of.id in self._asleep if self._sleeps(of) else None
        return Probe(
            of.id,
            self.now,
            ready=True,
            misses=0,
            failing_since=None,
            ready_since=self.now,
            busy=busy,
            sleeping=sleeping,
        )

    # ------------------------------------------------------------ acting

    def act(self, plan: Plan) -> bool:
        """Carry out what is ready; whether that changed anything."""
        before = list(self.incarnations), dict(self._calls)
        self.incarnations = [i for i in self.incarnations if i.id not in plan.archive]
        for action in plan.actions:
            if action.ready and action.op not in WAITS:
                self._carry_out(action)
        return before != (self.incarnations, self._calls)

    def _carry_out(self, action: Action) -> None:
        match action.op:
            case "start" | "start_workload":
                self._start(action)
            case "drain" if action.incarnation is not None:
                self._ask_to_stop(action, signal=False)
            case "stop" | "stop_workload":
                self._ask_to_stop(action, signal=True)
            case "kill":
                self._change(action.incarnation, lambda i: replace(i, strays=()))
            case "sleep" | "wake" if action.incarnation is not None and action.incarnation not in self._calls:
                took = action.expected[1] - action.expected[0]
                self._calls[action.incarnation] = (self.now.mono + max(SHORTEST_S, took), action)

    def _start(self, action: Action) -> None:
        if any(i.subject == action.subject and i.alive for i in self.incarnations):
            return
        name, endpoint = f"predicted-{self._serial + 1}", self._endpoint(action.subject.name)
        is_endpoint = action.subject.kind == "endpoint"
        started = Incarnation(
            id=name, subject=action.subject, process_hash=action.process_hash, gpus=action.gpus,
            memory_bytes=action.memory_bytes, exclusive=action.exclusive,
            port=endpoint.port if is_endpoint and endpoint is not None else None, started=self.now, phase="running",
            pid=self._pid(), strays=(), exit_code=None, exited=None, attempt=action.attempt,
        )  # fmt: skip
        self.incarnations.append(started)
        if is_endpoint:
            self._ready_at[name] = self.now.mono + self._load_s(action.subject.name)
        else:
            self._ends_at[name] = (self.now.mono + self._run_s(action.subject.name), 0)

    def _ask_to_stop(self, action: Action, *, signal: bool) -> None:
        target = next((i for i in self.incarnations if i.id == action.incarnation), None)
        if target is None:
            return
        stop = target.stop or StopProgress(self.now, drained=False, signalled=None)
        if target.stop is None:
            drain = min(self._times(target.subject.name)[1], stop_for(self._spec, target.subject, target).drain_s)
            self._drained_at[target.id] = self.now.mono + drain
        if signal and stop.signalled is None:
            self._ends_at[target.id] = (self.now.mono + self._stop_s(target), -15)
            stop = replace(stop, drained=True, signalled=self.now)
        self._change(target.id, lambda i: replace(i, stop=stop))

    def _change(self, name: str | None, change: Callable[[Incarnation], Incarnation]) -> None:
        self.incarnations = [change(i) if i.id == name else i for i in self.incarnations]

    # ------------------------------------------------------------ time

    def next_event(self) -> float:
        """Monotonic second of what happens next by itself; infinite: nothing does."""
        moments = [*self._ready_at.values(), *self._frees_at.values(), *self._drained_at.values()]
        moments += [at for at, _ in self._ends_at.values()] + [at for at, _ in self._calls.values()]
        return min((m for m in moments if m > self.now.mono), default=inf)

    def advance(self, to: float) -> None:
        """Let it be this monotonic second."""
        self.now = self.now.plus(to - self.now.mono)
        for name, (at, code) in list(self._ends_at.items()):
            if at <= to:
                del self._ends_at[name]
                self._end(name, code)
                self._ready_at.pop(name, None)
                self._frees_at[name] = to + MEMORY_RETURN_S
        self._frees_at = {n: at for n, at in self._frees_at.items() if at > to}
        for name, (at, action) in list(self._calls.items()):
            if at <= to:
                del self._calls[name]
                self._answered.append(action)
                (self._asleep.add if action.op == "sleep" else self._asleep.discard)(name)

    def _end(self, name: str, code: int) -> None:
        now = self.now
        self._change(name, lambda i: replace(i, phase="exited", exit_code=code, exited=now, pid=None, strays=()))

    def answer(self, ledger: Ledger) -> Ledger:
        """The ledger after the engines that were told to sleep or to wake up said that they have."""
        answered, self._answered = self._answered, []
        for action in answered:
            ledger, _ = called(ledger, action, None, self.now)
        return ledger

    # ------------------------------------------------------------ what is predicted of whom

    def _endpoint(self, name: str) -> EndpointSpec | None:
        if name in self._spec.endpoints:
            return self._spec.endpoints[name]
        overlays = (overlay for _, overlay in sorted(self._spec.overlays.items()))
        return next((o.endpoints[name] for o in overlays if name in o.endpoints), None)

    def _times(self, name: str) -> tuple[float, float, float]:
        endpoint = self._endpoint(name)
        if endpoint is None:
            return 0.0, 0.0, WORKLOAD_STOP_S
        times = self._situation.timings(endpoint)
        return times.load_s, times.drain_s, times.stop_s

    def _load_s(self, name: str) -> float:
        return max(SHORTEST_S, self._times(name)[0])

    def _stop_s(self, one: Incarnation) -> float:
        return WORKLOAD_STOP_S if one.subject.kind == "workload" else max(SHORTEST_S, self._times(one.subject.name)[2])

    def _run_s(self, name: str) -> float:
        overlay = self._spec.overlays.get(name)
        if overlay is None:
            return SHORTEST_S
        lasts = [s for s in (overlay.makespan.duration_s, self._runs.get(name)) if s is not None]
        if overlay.makespan.deadline is not None:
            lasts.append(overlay.makespan.deadline - self.now.wall)
        return max(SHORTEST_S, min(lasts, default=SHORTEST_S))

    def _residue(self, one: Incarnation) -> int:
        endpoint = self._endpoint(one.subject.name)
        return endpoint.profile.residual_bytes if endpoint is not None else 0

    def _sleeps(self, one: Incarnation) -> bool:
        endpoint = self._endpoint(one.subject.name)
        return endpoint is not None and endpoint.profile.sleep_check is not None

    def _pid(self) -> int:
        self._serial += 1
        return FIRST_PID + self._serial

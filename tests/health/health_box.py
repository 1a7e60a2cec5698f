"""A box to be assessed: one endpoint or a few, changed by keywords."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import Problem
from reconciler.health.assess import assess
from reconciler.health.facts import Facts
from reconciler.health.incident import Incident
from reconciler.plan.actions import Blocked, EndpointView, Event
from reconciler.plan.ledger import AgendaEntry, EndpointRecord, Exit, Ledger, OverlayRecord, Quarantine
from reconciler.plan.observed import Gpu, Incarnation, Observed, Subject
from reconciler.spec.spec import (
    EndpointSpec,
    Evict,
    GpuCount,
    Health,
    Node,
    Policy,
    Restart,
    Source,
    Spec,
    Stop,
    WholeGpu,
)

T0 = Instant(1_764_000_000.0, 5000.0)
SOURCE = Source("setpoints.yaml", 1, 1)


def endpoint_spec(name: str, *capabilities: str) -> EndpointSpec:
    return EndpointSpec(
        name=name, model="m", engine="vllm", executable=None, capabilities=capabilities, gpus=GpuCount(1),
        memory=WholeGpu(), port=8080, priority=900, state="running", preemptible=True, movable=True, evict=Evict(),
        args=(), command=None, env={}, env_file=None, cwd="/", health=Health(), stop=Stop(), restart=Restart(),
        process_hash="h", source=SOURCE,
    )  # fmt: skip


def view(name: str, state: str, desired: str = "running", reason: str = "") -> EndpointView:
    changes: dict[str, Any] = {"state": state, "desired": desired}
    return replace(EndpointView(name, "healthy", "running", reason, None, ()), **changes)


def crash(at: Instant = T0, code: int | None = -9) -> Exit:
    return Exit("i-1", at, code, planned=False)


def asked(at: Instant = T0) -> Exit:
    return Exit("i-1", at, 0, planned=True)


def entry(
    name: str, *states: str, start: float = -10.0, until: float = 100.0, overlay: str | None = "render"
) -> AgendaEntry:
    """In force from `start` to `until`, in seconds from T0."""
    expected: Any = states or ("stopping", "stopped", "pending", "starting", "healthy")
    return AgendaEntry(name, expected, T0.wall + start, T0.wall + until, "gives way to render", overlay)


def overlay_record(name: str, **changes: Any) -> OverlayRecord:
    return replace(OverlayRecord(name, "active", T0, T0.wall, "h", 600, SOURCE), **changes)


def killed(name: str, ago_s: float, **changes: Any) -> Incarnation:
    """An endpoint without GPUs that was killed so long ago, and does not end."""
    made = Incarnation(
        "i-1", Subject("endpoint", name), "h", (), (), exclusive=False, port=8080, started=T0.plus(-3600),
        phase="running", pid=1, strays=(), exit_code=None, exited=None, undying_since=T0.plus(-ago_s),
    )  # fmt: skip
    return replace(made, **changes)


def gpu(index: int, state: Any = "ok", detail: str = "") -> Gpu:
    return Gpu(index, f"GPU-{index}", "RTX 4090", state, 24 << 30, 0, (), detail, healthy=True, at=T0)


class Box(Struct, frozen=True):
    """What stands where at one moment; everything left out is well."""

    views: tuple[EndpointView, ...] = ()
    records: tuple[EndpointRecord, ...] = ()
    agenda: tuple[AgendaEntry, ...] = ()
    overlays: tuple[OverlayRecord, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    gpus_known: bool = True
    quarantines: tuple[Quarantine, ...] = ()
    problems: tuple[Problem, ...] = ()
    floors: Mapping[str, int] = field(default_factory=dict)
    """All endpoints offer all of these."""
    blocked: tuple[Blocked, ...] = ()
    incarnations: tuple[Incarnation, ...] = ()

    def facts(self) -> Facts:
        specs = {v.name: endpoint_spec(v.name, *self.floors) for v in self.views}
        return Facts(
            spec=Spec(Node("box", None), Policy(), self.floors, specs, {}, "digest"),
            endpoints={v.name: v for v in self.views},
            ledger=Ledger(
                overlays={o.name: o for o in self.overlays},
                endpoints={r.name: r for r in self.records},
                quarantines={q.gpu: q for q in self.quarantines},
                agenda=self.agenda,
            ),
            observed=Observed(T0, "boot", self.gpus, self.incarnations, gpus_known=self.gpus_known),
            problems=self.problems,
            blocked=self.blocked,
        )

    def wrong(self, after_s: float = 0.0) -> list[str]:
        """Kinds and subjects of the incidents that a first look opens."""
        incidents, _ = assess(self.facts(), (), T0.plus(after_s))
        return [f"{i.kind}/{i.subject}:{i.severity}" for i in incidents]


class Life:
    """One box over time, its incidents carried from look to look as the journal would."""

    def __init__(self) -> None:
        self.incidents: tuple[Incident, ...] = ()
        self.history: dict[str, Incident] = {}
        self.events: list[Event] = []

    def look(self, box: Box, at_s: float) -> tuple[Incident, ...]:
        unresolved = tuple(i for i in self.incidents if i.state != "resolved")
        self.incidents, events = assess(box.facts(), unresolved, T0.plus(at_s))
        self.history |= {i.id: i for i in self.incidents}
        self.events.extend(events)
        return self.incidents

    def story(self) -> list[str]:
        return [f"{e.kind} {e.cause}" for e in self.events]

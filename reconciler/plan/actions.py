"""`Plan`: the planner's answer, a graph of actions with their causes, and the ledger that makes them lawful."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from reconciler.clock import Instant
from reconciler.plan.ledger import AgendaEntry, EndpointState, Ledger
from reconciler.plan.observed import Subject
from reconciler.spec.spec import Source

Op = Literal[
    "drain", "stop", "kill", "sleep", "wake", "wait_memory", "start", "start_workload", "stop_workload",
    "wait_ready", "wait_end",
]  # fmt: skip
WAITS: frozenset[Op] = frozenset({"wait_memory", "wait_ready", "wait_end"})
"""Ops that nobody executes: observation fulfils them."""

Symbol = Literal["+", "-", "!", "<", "~", "?", "x"]
"""start, stop, evict, restore, changed, unknown/foreign, blocked"""


class Cause(Struct, frozen=True):
    """Why: ends at a line of a file, an overlay, or an observed fact."""

    kind: Literal[
        "setpoint", "edit", "removed", "overlay", "evict", "restore", "drift", "cancel", "request", "cleanup",
        "move",
    ]  # fmt: skip
    source: Source | None = None
    overlay: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        parts: list[str] = [self.kind]
        if self.overlay:
            parts.append(self.overlay)
        if self.detail:
            parts.append(f"({self.detail})")
        if self.source:
            parts.append(f"[{self.source}]")
        return " ".join(parts)


class Action(Struct, frozen=True):
    """One node of the graph. It may run only when every action in `needs` *succeeded*."""

    id: int
    needs: tuple[int, ...]
    op: Op
    subject: Subject
    gpus: tuple[str, ...]
    """UUIDs it touches."""
    reason: str
    cause: Cause
    timeout_s: float
    expected: tuple[float, float]
    """Predicted start and end, epoch seconds."""
    ready: bool
    """In the frontier: nothing it needs is outstanding."""
    incarnation: str | None = None
    """Whom drain, stop, kill, sleep and wake are about."""
    memory_bytes: tuple[int, ...] = ()
    """Starts: planned bytes on each of `gpus`."""
    exclusive: bool = False
    process_hash: str = ""
    """Starts: what the new incarnation is started for."""
    attempt: int = 0
    overlay: str | None = None
    """Starts: the overlay it belongs to, if any."""


class Change(Struct, frozen=True):
    """What happens to one subject, for people."""

    subject: Subject
    symbol: Symbol
    actions: tuple[int, ...]
    reason: str
    cause: Cause
    expected_back: float | None
    """Epoch seconds; for what is evicted: when it is predicted to be ready again."""


class Drift(Struct, frozen=True):
    """A difference between set point and observation."""

    subject: Subject
    expected: str
    observed: str


class Blocked(Struct, frozen=True):
    """Something wanted that cannot happen now, and what would unblock it."""

    subject: Subject
    reason: str
    """A code in CamelCase: GpuOccupied, NoConsent, FloorWouldBreak, PriorityTooLow, PortInUse, CoolDown…"""
    message: str
    alternatives: tuple[str, ...] = ()
    earliest_start: float | None = None
    transient: bool = False
    """It will be decided anew by itself (time, memory, another's end); nobody needs to act."""


class Verdict(Struct, frozen=True):
    """Why overlays that are admitted together displace these and nobody else."""

    victims: Mapping[str, str]
    """Who gives way → the overlay that takes the place; both by name."""
    cost: Mapping[str, int]
    """What was compared, the most important part first; parts that are 0 are left out. Names end in their unit."""
    runner_up: tuple[tuple[str, ...], Mapping[str, int]] | None
    """The next best victims with which the same overlays fit, and their cost; None: none was found."""
    worse: str
    """In words: where the runner-up is worse."""
    all_seen: bool
    """The search for the runner-up came to its end: there is no better one, or none at all."""
    optimal: bool
    """Proved: nothing costs less."""
    bound: Mapping[str, int]
    """Nothing costs less than this."""
    steps: int
    """Of the search, the one for the runner-up included."""
    moves: Mapping[str, str] = field(default_factory=dict)
    """Who is started on other GPUs → the overlay for which it makes room; both by name. The runner-up of a choice with
    moves is the best one without any."""
    kept: tuple[str, ...] = ()
    """Windows to come and returns, by name, for which GPUs are kept that have room now, if not for all of it."""


class Event(Struct, frozen=True):
    """One decision, for the journal: what changed in the ledger and why."""

    kind: str
    subject: str
    message: str
    cause: str


class EndpointView(Struct, frozen=True):
    """How one endpoint stands at this moment."""

    name: str
    state: EndpointState
    desired: Literal["running", "standby", "stopped", "displaced"]
    reason: str
    incarnation: str | None
    gpus: tuple[str, ...]
    """UUIDs it runs on or is placed on."""


class Plan(Struct, frozen=True):
    """The whole decision for one moment."""

    spec_hash: str
    observed_fingerprint: str
    """Hash of the observed facts that the decision read; utilisation and times are no such facts."""
    now: Instant
    converged: bool
    """Nothing left to do but to wait for the ends of overlays."""
    drift: tuple[Drift, ...]
    changes: tuple[Change, ...]
    actions: tuple[Action, ...]
    """Topologically sorted; ids are 1, 2, 3… in this order."""
    blocked: tuple[Blocked, ...]
    budgets: tuple[str, ...]
    objective: Mapping[str, float]
    proof: str
    agenda: tuple[AgendaEntry, ...]
    """Entries in force and to come, forecast ones included; the durable ones are in `ledger.agenda`."""
    ledger: Ledger
    """The ledger once this plan is decided; to be made durable before any action."""
    events: tuple[Event, ...]
    endpoints: Mapping[str, EndpointView]
    next_wake: Instant | None
    """When the planner wants to be asked again even if nothing happens."""
    archive: tuple[str, ...] = ()
    """Ended incarnations whose end is in `ledger`: their records may be put away."""
    verdicts: tuple[Verdict, ...] = ()
    """Of the admissions of this decision that displace somebody."""
    notes: tuple[str, ...] = ()
    """What else people should know: that nobody was moved because nothing is installed that could tell whom."""
    solved: bool = False
    """The solver was asked; another version of it, or none, may come to another plan."""

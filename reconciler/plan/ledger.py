"""`Ledger`: what was decided before, and what history teaches. The planner's third argument and part of its answer.

The planner never mutates a ledger: it returns the next one in `Plan.ledger`, and the journal makes that durable before
anything acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from reconciler.clock import Instant
from reconciler.plan.observed import Subject
from reconciler.spec.spec import Source

OverlayState = Literal[
    "pending", "admitted", "evicting", "starting", "active", "overrun", "completing", "restoring",
    "done", "failed", "cancelled", "expired",
]  # fmt: skip
TERMINAL: frozenset[OverlayState] = frozenset({"done", "failed", "cancelled", "expired"})
LIVE: frozenset[OverlayState] = frozenset(
    {"admitted", "evicting", "starting", "active", "overrun", "completing", "restoring"}
)

EndpointState = Literal[
    "pending", "starting", "healthy", "unhealthy", "failed", "stopping", "stopped", "sleeping", "unknown"
]  # fmt: skip


class Strangers(Struct, frozen=True):
    """What was foreign on a GPU when a reservation there became active."""

    processes: tuple[tuple[int, int], ...]
    """Pid and bytes of those that NVML named, in order."""
    nameless_bytes: int


class Lease(Struct, frozen=True):
    """A live overlay's hold on part of one GPU, on behalf of one of its subjects."""

    overlay: str
    subject: Subject
    gpu: str
    """UUID."""
    memory_bytes: int
    exclusive: bool
    since: Instant
    strangers: Strangers | None = None
    """Of a reservation that is active: who is none of its guests. None: it is none, or nobody could look yet."""


class Span(Struct, frozen=True):
    """One part of a run of an overlay: how long it was predicted to take when it began, and how long it took."""

    part: Literal["wait", "evict", "run", "restore"]
    """wait: for its window or a place; evict: until its work begins; run: every attempt of it; restore: until the
    baseline is back."""
    began: Instant
    predicted_s: float | None = None
    """None: nothing told how long."""
    actual_s: float | None = None
    """None: it is not over."""


class OverlayRecord(Struct, frozen=True):
    """Where one run of one overlay stands."""

    name: str
    state: OverlayState
    since: Instant
    """When it entered this state."""
    window_start: float
    """Epoch seconds of the start this run is for; tells one cron occurrence from the next."""
    placement_hash: str
    priority: int
    source: Source
    gpus: tuple[str, ...] = ()
    """UUIDs of the workload's or reservation's GPUs, kept for display after the leases are gone."""
    evicted: tuple[str, ...] = ()
    """Endpoints it displaced."""
    moved: tuple[str, ...] = ()
    """Endpoints that were started on other GPUs to make room for it."""
    seized: tuple[str, ...] = ()
    """Lower overlays it displaced."""
    active_since: Instant | None = None
    attempt: int = 0
    """The number of its present start: 0 for the first."""
    unstarted: int = 0
    """Starts that somebody's death cut short before anything ran; they are no tries."""
    exit_code: int | None = None
    outcome: Literal["done", "failed", "cancelled", "expired"] | None = None
    """What it will be once the baseline is back; set on entering `completing`."""
    reason: str = ""
    why: str = ""
    """Why it displaced these and nobody else, in words, as told when it was admitted."""
    spans: tuple[Span, ...] = ()
    """The parts of this run so far, in order."""
    last_run: tuple[Span, ...] = ()
    """The parts of the run before this one."""
    seen: Instant | None = None
    """When it was asked for; of a schedule: when the schedule was. Of equals, who was first keeps a place."""

    @property
    def failures(self) -> int:
        """Tries that ran and failed."""
        return self.attempt - self.unstarted


class Exit(Struct, frozen=True):
    """One observed end of one incarnation."""

    incarnation: str
    at: Instant
    exit_code: int | None
    planned: bool
    """We had asked for it, and not because it was unhealthy; or the box went down. Nobody has to be told."""
    failure: str | None = None
    """What its log said of it: a class and a hint."""
    ended_for: str | None = None
    """What was wrong with it, or with the box, so that it was ended; None: it ended by itself, or nothing was."""


class Nap(Struct, frozen=True):
    """How far one incarnation has come with giving way by sleeping, and with waking up again."""

    incarnation: str
    level: int
    since: Instant
    """When it was decided; requests in flight are given time to finish from here."""
    begun: Instant | None = None
    """The engine is being told to sleep, and this is seen through."""
    slept: Instant | None = None
    """It said that it has."""
    waking: Instant | None = None
    """The engine is being told to wake up."""
    woken: Instant | None = None
    """It said that it has."""
    failed: str | None = None
    """Why it can be trusted no more: it is stopped, and started afresh when it is wanted."""
    why: str = ""
    """Why it sleeps at this level, in words, as told when it was decided."""


class Move(Struct, frozen=True):
    """Where an endpoint is started anew, so that another has room where it runs; recorded before it is stopped."""

    incarnation: str
    """The one that leaves."""
    gpus: tuple[str, ...]
    """UUIDs: the place that is kept for it."""
    by: str
    """The overlay for which it makes room."""
    since: Instant


class EndpointRecord(Struct, frozen=True):
    """What is remembered of one endpoint between ticks and over restarts of the daemon."""

    name: str
    state: EndpointState = "stopped"
    """The state last decided upon; a change of it is an event."""
    state_since: Instant | None = None
    exits: tuple[Exit, ...] = ()
    """The last few, oldest first."""
    streak: int = 0
    """Unplanned ends in a row without `reset_after` of readiness between them."""
    ready_incarnation: str | None = None
    """The incarnation that was last seen ready (so that an adopted one that fails is unhealthy, not starting)."""
    ready_since: Instant | None = None
    unhealthy_since: Instant | None = None
    ending: str | None = None
    """What is wrong with what runs of it, so that it is ended; noted before it is asked to stop."""
    failed: str | None = None
    """Why it is failed; sticky until `failed_hash` no longer matches, or `reset`."""
    failed_hash: str | None = None
    evictions: tuple[float, ...] = ()
    """Epoch seconds of past evictions and moves, within the last hour and the last one before it."""
    evicted_by: str | None = None
    """The overlay that displaced it; None once it is ready again."""
    renew_before: Instant | None = None
    """Incarnations started before this are to be replaced (clean-start)."""
    last_gpus: tuple[str, ...] = ()
    """Where it last ran: preferred when it comes back."""
    nap: Nap | None = None
    """It sleeps, or is about to, or wakes up."""
    move: Move | None = None
    """It is moved, until it is ready where it was to go."""


class Quarantine(Struct, frozen=True):
    """A GPU that nothing is placed on until `reset`."""

    gpu: str
    since: Instant
    reason: str


class AgendaEntry(Struct, frozen=True):
    """One planned transition of one endpoint. Inside it, and only for these states, nothing is an incident."""

    endpoint: str
    expected_states: tuple[EndpointState, ...]
    """In the order in which they are expected."""
    start: float
    """Epoch seconds."""
    until: float
    """Epoch seconds; never open-ended."""
    reason: str
    overlay: str | None


class Timings(Struct, frozen=True):
    """Predicted seconds for one endpoint or workload; learnt from history, engine defaults before that."""

    load_s: float
    drain_s: float
    stop_s: float
    sleep_s: Mapping[int, float] = field(default_factory=dict)
    """By sleep level, of those that were measured."""
    wake_s: Mapping[int, float] = field(default_factory=dict)
    """The same."""
    memory_s: float | None = None
    """From its end until its memory is seen free; None: not measured."""


class Ledger(Struct, frozen=True):
    """Everything durable that the planner reads and writes."""

    boot_id: str = ""
    overlays: Mapping[str, OverlayRecord] = field(default_factory=dict)
    leases: tuple[Lease, ...] = ()
    endpoints: Mapping[str, EndpointRecord] = field(default_factory=dict)
    quarantines: Mapping[str, Quarantine] = field(default_factory=dict)
    """By GPU UUID."""
    agenda: tuple[AgendaEntry, ...] = ()
    timings: Mapping[str, Timings] = field(default_factory=dict)
    """By endpoint name; read only."""
    runs: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the work of an overlay usually takes, by its name: p95 of those that went well; read only."""

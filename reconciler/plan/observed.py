"""`Observed`: what the box showed, with a time on each part. The planner's second argument.

`None` and the state `unknown` mean *could not be seen*, never *not there*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from reconciler.clock import Instant
from reconciler.spec.spec import Questions, Stop

SubjectKind = Literal["endpoint", "workload"]


class Subject(Struct, frozen=True, order=True):
    """Whom an incarnation belongs to: an endpoint, or the workload of an overlay."""

    kind: SubjectKind
    name: str

    def __str__(self) -> str:
        return self.name


class GpuProcess(Struct, frozen=True):
    """One process that NVML names on one GPU."""

    pid: int
    memory_bytes: int | None
    """None: NVML does not say (N/A); never 0 for that."""
    owner: Subject | None
    """None: foreign, never to be signalled."""
    user: str | None
    command: str | None


class Gpu(Struct, frozen=True):
    """One GPU as NVML shows it."""

    index: int
    uuid: str
    name: str
    state: Literal["ok", "unknown", "lost"]
    total_bytes: int
    """The last total seen; survives `unknown` and `lost`."""
    used_bytes: int | None
    processes: tuple[GpuProcess, ...] | None
    detail: str
    """Why it is unknown or lost, or a health gate (pending row remap, retired pages); else empty."""
    healthy: bool
    """False: pending row remap or retirement; nothing new is placed on it."""
    at: Instant
    """When this was read."""
    numa_node: int | None = None
    nvlink_island: int | None = None
    """GPUs that NVLink joins, directly or through switches, have the same; None: there is none, or it was not told."""


Phase = Literal["intent", "running", "exited", "vanished", "unknown"]
"""
intent:   recorded, and its lock is held (or not yet taken): the shim has not reported a process yet
running:  the leader is alive, its identity verified
exited:   the leader is gone and its exit was recorded
vanished: the leader is gone, or never started, without an exit record; its exit code is unknown for ever
unknown:  the leader's identity could not be verified (unreadable /proc or record); never acted upon
"""


class StopProgress(Struct, frozen=True):
    """How far a stop has come; recorded durably so that a new daemon signals nobody twice."""

    requested: Instant
    drained: bool
    """Draining ended: nothing in flight, or its time was up."""
    signalled: Instant | None
    """When the leader got its stop signal; None: not yet."""


class Incarnation(Struct, frozen=True):
    """One start of one endpoint or workload, from its records and the process table."""

    id: str
    subject: Subject
    process_hash: str
    """The `process_hash` (endpoint) or `placement_hash` (workload) it was started for."""
    gpus: tuple[str, ...]
    """UUIDs it was given."""
    memory_bytes: tuple[int, ...]
    """Planned bytes on each of `gpus`, in the same order."""
    exclusive: bool
    """It claimed whole GPUs."""
    port: int | None
    started: Instant
    """Time of the intent."""
    phase: Phase
    pid: int | None
    """The leader's pid once known."""
    strays: tuple[int, ...] | None
    """Living members other than the leader (verified ours); None: could not be seen."""
    exit_code: int | None
    """0..255, or -signal; None while alive, or unknown (`vanished`)."""
    exited: Instant | None
    stop: StopProgress | None = None
    attempt: int = 0
    """Workloads: 0 for the first try, 1 for the first retry…"""
    failure: str | None = None
    """Of one that ended: why its program could not be run, or of endpoints the class of failure and a hint, as the end
    of the log tells; None: neither is known."""
    undying_since: Instant | None = None
    """When SIGKILL was sent that did not end it; None: it was not, or it ended at once."""
    stop_settings: Stop | None = None
    """How its file had it stopped when it was started, which counts once the file is gone; None: not recorded."""
    questions: Questions | None = None
    """What its server is asked, in the same way; None: it is none, or it was not recorded."""
    lived_until: Instant | None = None
    """When processes of it were last seen to live after its leader had ended; None: none were."""
    bygone: bool = False
    """The boot, or the container, in which it was started is over. All of it ended with that, if not before."""

    @property
    def alive(self) -> bool:
        """Something of it may still run: it holds its GPUs, port and lock."""
        return self.phase in ("intent", "running", "unknown") or self.strays is None or bool(self.strays)


class Probe(Struct, frozen=True):
    """What an endpoint's HTTP port last said, for one incarnation."""

    incarnation: str
    at: Instant
    ready: bool | None
    """None: not asked yet, or the question could not be put."""
    misses: int
    """Misses in a row up to now."""
    failing_since: Instant | None
    ready_since: Instant | None
    busy: int | None = None
    """Requests running + waiting; None: the engine does not say."""
    sleeping: bool | None = None
    sleeping_at: Instant | None = None
    """When it was last asked that and said so: it may be ready at `at` and not have told; None: it never told."""
    detail: str = ""
    progress: int | None = None
    """Its counter of work done, when it was last read."""
    moved: Instant | None = None
    """Since when that counter is where it is, with requests running all the while; None: none runs."""
    progress_at: Instant | None = None
    """When it was last read."""

    @property
    def frozen_s(self) -> float:
        """Seconds between two readings of its counter of work that were the same, with requests running at each.

        Between readings: a page that does not come, because the box is busy, makes nobody hung.
        """
        if self.moved is None or self.progress_at is None:
            return 0.0
        return self.progress_at.since(self.moved)


class PortHolder(Struct, frozen=True):
    """A process other than ours that listens on a port we need."""

    port: int
    pid: int | None
    """None: someone listens, but who could not be seen."""
    command: str | None


class Obstacle(Struct, frozen=True):
    """What is certain to keep something from being started: its program, folder, user or env_file."""

    message: str
    hint: str | None
    """What to do."""


class Observed(Struct, frozen=True):
    """One look at the box."""

    at: Instant
    boot_id: str
    gpus: tuple[Gpu, ...]
    """In NVML order. GPUs seen before and missing now are listed as `lost`."""
    incarnations: tuple[Incarnation, ...]
    """Living ones, and ended ones until their end is in the ledger; sorted by subject, then start."""
    probes: Mapping[str, Probe] = field(default_factory=dict)
    """By incarnation id."""
    ports: Mapping[int, PortHolder] = field(default_factory=dict)
    """Foreign listeners on ports that endpoints without a living incarnation want."""
    clock_jumped: bool = False
    """The wall clock jumped by more than 60 s since the last look; what it alone demands waits for one more look."""
    gpus_known: bool = True
    """False: the driver did not answer and `gpus` says nothing."""
    gpus_detail: str = ""
    host_available_bytes: int | None = None
    """Host memory that can be had without swapping; None: it could not be read."""
    obstacles: Mapping[str, Obstacle] = field(default_factory=dict)
    """By process_hash or placement_hash, of those for whose start somebody would have to end. Of others nothing is
    known that would keep them from being started."""

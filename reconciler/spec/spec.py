"""`Spec`: the set points and overlays, resolved.

Every default is applied, every name (priority, profile, unit) looked up, every path absolute. What depends on the box
(a pin's GPU, a fraction's bytes) stays symbolic and is resolved by the planner against the observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from reconciler.errors import Problem
from reconciler.spec.profiles import PROFILES, EngineProfile
from reconciler.spec.secrecy import Discreet

SetPoint = Literal["running", "standby", "stopped"]


class Source(Struct, frozen=True, order=True):
    """Where something was written: the cause of a decision ends here."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


# ---------------------------------------------------------------- claims on GPUs


class GpuPins(Struct, frozen=True):
    """Exactly these GPUs, by index in NVML order or by UUID."""

    refs: tuple[int | str, ...]

    @property
    def count(self) -> int:
        """How many GPUs are claimed."""
        return len(self.refs)


class GpuCount(Struct, frozen=True):
    """Any GPUs, this many, all or none."""

    count: int


GpuClaim = GpuPins | GpuCount


class WholeGpu(Struct, frozen=True):
    """The whole GPU, exclusively: its total less the node's reserve."""


class MemoryFraction(Struct, frozen=True):
    """This part (0 < fraction <= 1) of each GPU's total memory."""

    fraction: float


class MemoryBytes(Struct, frozen=True):
    """This many bytes on each GPU."""

    bytes: int


MemoryClaim = WholeGpu | MemoryFraction | MemoryBytes


# ---------------------------------------------------------------- endpoints


class Health(Struct, frozen=True):
    """How an endpoint is asked whether it is ready."""

    path: str = "/health"
    interval_s: float = 5.0
    timeout_s: float = 10.0
    failures: int = 3
    """Misses in a row before a ready endpoint counts as unhealthy."""
    startup_s: float = 900.0
    """Deadline for the first readiness; no liveness kill before it."""
    unhealthy_for_s: float = 60.0
    """Unhealthy for this long leads to a restart."""
    hung_s: float = 120.0
    """A counter of tokens frozen for this long with requests running is a hang. A token takes milliseconds, the longest
    prefill seconds (vllm#36451, #39863: `/health` stays green)."""


class Questions(Struct, frozen=True):
    """What a server is asked over HTTP, and where; recorded with each start, for when no file speaks of it any more."""

    health_path: str
    interval_s: float
    timeout_s: float
    failures: int
    hung_s: float
    metrics_path: str
    busy_metrics: tuple[str, ...]
    """Their sum is the number of requests running and waiting; empty: it does not say."""
    running_metrics: tuple[str, ...]
    progress_metrics: tuple[str, ...]
    load_path: str | None


class Stop(Struct, frozen=True):
    """How a process is asked to end."""

    signal: str = "SIGTERM"
    drain_s: float = 15.0
    grace_s: float = 30.0


class Restart(Struct, frozen=True):
    """Back-off between restarts and the budget after which an endpoint is failed."""

    initial_s: float = 1.0
    max_s: float = 300.0
    reset_after_s: float = 600.0
    max_restarts: int = 5
    window_s: float = 600.0


class Logs(Struct, frozen=True):
    """How much of the output is kept; takes effect with the next start (`max_bytes`) and the next end (`keep`)."""

    max_bytes: int = 64 << 20
    """Of the output of one start, a quarter more at times: days of an engine."""
    keep: int = 20
    """Past starts kept with their output: enough to see a pattern of crashes, little enough to need no janitor."""


class Evict(Struct, frozen=True):
    """How an endpoint gives way: `stop`, or `sleep` at an engine's sleep level."""

    method: Literal["stop", "sleep"] = "stop"
    level: Literal[1, 2] = 1
    """The lightest level it may use: 1 where host memory allows and level 2 otherwise, or always 2."""
    weights_bytes: int | None = None
    """Host memory that its weights take at level 1; None: as much as it was planned on its GPUs, the most it can be."""


class EndpointSpec(Discreet, frozen=True):
    """A model server of the baseline, or a temporary one of an overlay."""

    discreet_about = frozenset({"env"})

    name: str
    model: str | None
    engine: str
    """Name of an engine profile (`spec.engines`)."""
    executable: str | None
    """None: the profile's own, looked up on PATH."""
    capabilities: tuple[str, ...]
    gpus: GpuClaim
    memory: MemoryClaim
    port: int | None
    priority: int
    state: SetPoint
    preemptible: bool
    movable: bool
    evict: Evict
    args: tuple[str, ...]
    command: tuple[str, ...] | None
    """The whole command of `engine: custom`; {port} {model} {gpus} {memory} are filled in at start."""
    env: Mapping[str, str]
    env_file: str | None
    """Absolute path; values never shown. Read by the shim's starter, not kept here."""
    cwd: str
    health: Health
    stop: Stop
    restart: Restart
    process_hash: str
    """Covers exactly the fields whose change needs a new process (and the digest of `env_file`'s content);
    not priority, capabilities, state, consent, health, stop, restart, logs or evict, and not *which* GPUs are claimed,
    only how many and how much memory."""
    source: Source
    logs: Logs = Logs()
    own_profile: EngineProfile | None = None
    """The profile that the set points define under the name `engine`; None: the one that comes with the program."""
    user: str | None = None
    """Whom it runs as; None: the daemon's user."""

    @property
    def profile(self) -> EngineProfile:
        """What is known of its engine."""
        return self.own_profile or PROFILES[self.engine]

    @property
    def questions(self) -> Questions:
        """What its server is asked."""
        health, profile = self.health, self.profile
        return Questions(
            health.path, health.interval_s, health.timeout_s, health.failures, health.hung_s,
            profile.metrics_path or "/metrics", profile.busy_metrics, profile.running_metrics,
            profile.progress_metrics, profile.load_path,
        )  # fmt: skip


# ---------------------------------------------------------------- overlays


class Makespan(Struct, frozen=True):
    """When an overlay runs, and for how long."""

    start: float | None
    """Epoch seconds; None: as soon as the file is seen (or by `schedule`)."""
    duration_s: float | None
    """Expected; None only with a deadline."""
    grace_s: float
    on_overrun: Literal["continue", "stop"]
    deadline: float | None
    """Epoch seconds; hard."""
    schedule: str | None
    timezone: str | None
    starting_deadline_s: float


class Workload(Discreet, frozen=True):
    """A command run to completion."""

    discreet_about = frozenset({"env"})

    command: tuple[str, ...]
    env: Mapping[str, str]
    env_file: str | None
    cwd: str
    retries: int
    preemptible: bool
    stop: Stop
    logs: Logs = Logs()
    user: str | None = None
    """Whom it runs as; None: the daemon's user."""


class OverlaySpec(Struct, frozen=True):
    """One file that changes the desired state for a while. Its name is the file's stem."""

    name: str
    priority: int
    allow_baseline_eviction: bool
    makespan: Makespan
    gpus: GpuClaim | None
    """None: the overlay itself needs no GPU (it only sets or requires)."""
    memory: MemoryClaim
    requires: tuple[str, ...]
    workload: Workload | None
    endpoints: Mapping[str, EndpointSpec]
    """`set`, resolved: the patched or temporary endpoints, complete."""
    on_edit: Literal["wait", "replace"]
    placement_hash: str
    """Covers what a running overlay cannot change in place: gpus, memory, workload, set, requires."""
    source: Source
    change_pending: bool = False
    """The file was edited in a way that waits for the end of the present run (`on_edit: wait`)."""


# ---------------------------------------------------------------- the whole


class Node(Struct, frozen=True):
    """What the files say of the box itself."""

    name: str
    gpus: tuple[int | str, ...] | None
    """Indices or UUIDs that may be used; None: all."""
    reserve_bytes: int = 1 << 30
    """Memory on each GPU never planned; foreign use below it costs nothing."""
    host_reserve_bytes: int = 4 << 30
    """Host memory that parked weights leave to everybody else."""


class Policy(Struct, frozen=True):
    """Brakes against thrashing."""

    max_evictions_per_hour: int = 3
    min_ready_s: float = 120.0
    resync_s: float = 10.0


class Notifier(Discreet, frozen=True):
    """Whom incidents are told: exactly one of `webhook`, `webhook_file` and `command` is not None."""

    discreet_about = frozenset({"webhook", "headers"})

    name: str
    severity: Literal["info", "warning", "critical"]
    """The least that is told."""
    format: Literal["json", "slack", "ntfy"]
    webhook: str | None
    """Often a secret: never shown but for its host."""
    webhook_file: str | None
    """Absolute path of a file that holds the address; read at each delivery, not kept here."""
    command: tuple[str, ...] | None
    headers: Mapping[str, str]
    source: Source


class Spec(Struct, frozen=True):
    """Everything people wrote, resolved; the planner's first argument."""

    node: Node
    policy: Policy
    floors: Mapping[str, int]
    """Capability → least number of ready providers that no preemption may break (`min_available`)."""
    endpoints: Mapping[str, EndpointSpec]
    overlays: Mapping[str, OverlaySpec]
    digest: str
    """Hash of the meaning (not of comments or order); equal digest, equal spec."""
    problems: tuple[Problem, ...] = field(default=())
    """Rejected overlay files; they change nothing."""
    notify: Mapping[str, Notifier] = field(default_factory=dict)
    metrics_port: int | None = None
    """Loopback port of the Prometheus page; None: there is none."""
    withdrawn: tuple[str, ...] = ()
    """Overlays that are not here though their files are: everything is to be stopped."""

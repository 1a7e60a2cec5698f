"""The set-point file as pydantic models. Defaults of `Health`, `Stop`, `Restart` and `Policy` stand in `spec.spec`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from reconciler.spec.spec import Health, Logs, Node, Policy, Restart, SetPoint, Stop
from reconciler.spec.values import (
    Command,
    Count,
    Duration,
    EnvValue,
    Flag,
    Gpus,
    Header,
    LogSize,
    Memory,
    Metrics,
    Names,
    NodeGpus,
    Port,
    PositiveDuration,
    Priority,
    PriorityNumber,
    Size,
    Text,
    Url,
    UrlPath,
    Version,
    Word,
    Words,
)

DEFAULT_PRIORITY = 500
_HEALTH, _STOP, _RESTART, _LOGS, _POLICY, _NODE = Health(), Stop(), Restart(), Logs(), Policy(), Node("", None)

Empty = BeforeValidator(lambda data: {} if data is None else data)

Signal = Literal["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2"]
"""SIGKILL is left out on purpose: it orphans an engine's workers, and it follows by itself after the grace."""


class Model(BaseModel):
    """What all parts of the files share. Building is deferred to the first file read: importing stays cheap.

    A part that is left out is constructed, not validated: defaults are sound, and its class need not be built for that.

    What stands under a field is its description; `spec.schema` reads it there. Rejected: `use_attribute_docstrings`,
    with which every command that reads a file parses the source of these modules, 20 ms at each start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def accept_empty(cls, data: Any) -> Any:
        """A key whose lines are all commented out is an empty mapping."""
        return {} if data is None else data


class HealthModel(Model):
    """How an endpoint is asked whether it is ready."""

    path: UrlPath | None = None
    """Path that answers 200 when the endpoint is ready. Default: the engine's own."""
    interval: PositiveDuration = _HEALTH.interval_s
    """Time between two questions."""
    timeout: PositiveDuration = _HEALTH.timeout_s
    """How long an answer may take."""
    failures: Annotated[Count, Ge(1)] = _HEALTH.failures
    """Misses in a row before a ready endpoint counts as unhealthy."""
    startup: PositiveDuration = _HEALTH.startup_s
    """Deadline for the first readiness; nothing is killed for being silent before it."""
    unhealthy_for: Duration = _HEALTH.unhealthy_for_s
    """Unhealthy for this long leads to a restart."""
    hung: PositiveDuration = _HEALTH.hung_s
    """No token made for this long, with requests running, is a hang: unhealthy. For engines that count them (vLLM)."""


class StopModel(Model):
    """How a process is asked to end."""

    signal: Signal = "SIGTERM"
    """Sent once, to the leader; SIGKILL to everything left follows after `grace`."""
    drain: Duration = _STOP.drain_s
    """How long requests in flight may finish before the signal."""
    grace: Duration = _STOP.grace_s
    """How long after the signal before SIGKILL."""


class RestartModel(Model):
    """Back-off between restarts, and the budget after which an endpoint is failed."""

    initial: Duration = _RESTART.initial_s
    """Wait before the second restart in a row; the first is immediate, and each later one waits twice as long."""
    max: PositiveDuration = _RESTART.max_s
    """Longest wait."""
    reset_after: Duration = _RESTART.reset_after_s
    """Ready for this long ends a row of failures."""
    max_restarts: Annotated[Count, Ge(0), Le(1000)] = _RESTART.max_restarts
    """More than this many restarts within `window` and the endpoint is failed until it is edited or reset."""
    window: PositiveDuration = _RESTART.window_s
    """The window that `max_restarts` counts in."""


class LogsModel(Model):
    """How much of the output is kept."""

    max: LogSize = _LOGS.max_bytes
    """Kept of the output of each start, its end in one piece; a quarter more at times. From the next start on."""
    keep: Annotated[Count, Ge(1), Le(1000)] = _LOGS.keep
    """Past starts whose output and records are kept."""


class EvictModel(Model):
    """How an endpoint gives way to an overlay."""

    method: Literal["stop", "sleep"] = "stop"
    """`stop` ends the process; `sleep` frees the GPU memory and keeps the process (engines that can)."""
    level: Annotated[Count, Ge(1), Le(2)] = 1
    """Sleep level: 1 keeps the weights in host memory (2 is taken where that lacks), 2 always drops them."""
    weights: Size | None = None
    """Host memory that the weights take at level 1. Default: the memory planned on its GPUs, the most it can be."""


class EndpointModel(Model):
    """A model server that should be there."""

    model: Text | None = None
    """What it serves: a repository name or a path. Required unless the engine is `custom`."""
    engine: Text = "vllm"
    """Engine profile: vllm, sglang, llamacpp, tgi, tei, custom, or one of one's own (`engines`)."""
    executable: Text | None = None
    """Program to start. Default: the engine's own, looked up on PATH; a path is taken as it is."""
    capabilities: Names = ()
    """What it offers; overlays ask for these names, and floors count them."""
    gpus: Gpus | None = None
    """How many GPUs, all or none (`2`; `0` needs none), or exactly which (`[0, 1]`). Default: 1."""
    memory: Memory | None = None
    """Memory on each GPU: a size, or a fraction of the GPU. Default: the whole GPU, exclusively."""
    port: Port | None = None
    """Port it listens on. Required unless the engine is `custom`."""
    priority: Priority = DEFAULT_PRIORITY
    """Bigger is more important; a number, or a name from `priorities`."""
    state: SetPoint = "running"
    """`running`; `standby`: started only when a capability of it is asked for; or `stopped`."""
    preemptible: Flag = True
    """Whether an overlay of higher priority may take its GPUs; `false` is hard."""
    movable: Flag = False
    """Whether it may be restarted on other GPUs to make room for an overlay of higher priority that may evict, or for
    an endpoint of higher priority without a place. Needs a count of GPUs, and the extra `solver`: without that, what
    runs is not moved."""
    evict: EvictModel = Field(default_factory=EvictModel.model_construct)
    """How it gives way."""
    args: Words = ()
    """Appended to the engine's command line."""
    command: Command | None = None
    """The whole command, for `engine: custom`; {port} {model} {gpus} {memory} are filled in. Never a shell line."""
    env: Annotated[dict[str, EnvValue], Empty] = Field(default_factory=dict)
    """Variables added to its environment."""
    env_file: Text | None = None
    """File of KEY=VALUE lines, relative to this file; its values are never shown."""
    cwd: Text | None = None
    """Working directory, relative to this file. Default: the folder of this file."""
    user: Text | None = None
    """User that it runs as, which only root may choose. Default: the one who runs reconciler."""
    health: HealthModel = Field(default_factory=HealthModel.model_construct)
    """How it is asked whether it is ready."""
    stop: StopModel = Field(default_factory=StopModel.model_construct)
    """How it is asked to end."""
    restart: RestartModel = Field(default_factory=RestartModel.model_construct)
    """What happens when it ends by itself."""
    logs: LogsModel = Field(default_factory=LogsModel.model_construct)
    """How much of its output is kept."""


class NodeModel(Model):
    """The box itself."""

    name: Text | None = None
    """Name in output. Default: the host name."""
    gpus: NodeGpus = None
    """GPUs that may be used: `all`, or a list of indices or UUIDs."""
    reserve: Size = _NODE.reserve_bytes
    """Memory on each GPU that is never planned."""
    host_reserve: Size = _NODE.host_reserve_bytes
    """Host memory that endpoints which sleep at level 1 leave to everybody else."""


class CapabilityModel(Model):
    """A name that endpoints offer."""

    min_available: Annotated[Count, Ge(0), Le(1000)] = 0
    """Floor on ready providers that no eviction may break."""


class PolicyModel(Model):
    """Brakes against thrashing."""

    max_evictions_per_hour: Annotated[Count, Ge(0), Le(1000)] = _POLICY.max_evictions_per_hour
    """Evictions of one endpoint within an hour; more are put off."""
    min_ready: Duration = _POLICY.min_ready_s
    """Readiness that an endpoint is left between two evictions."""
    resync: PositiveDuration = _POLICY.resync_s
    """The box is looked at this often even when nothing happens."""


class NotifierModel(Model):
    """Somebody who is told of incidents: by a webhook, or by a program."""

    severity: Literal["info", "warning", "critical"] = "warning"
    """Least severity that is told."""
    webhook: Url | None = None
    """Address to post to; treated as a secret."""
    webhook_file: Text | None = None
    """File that holds the address, relative to this file: keeps a secret out of the set points."""
    command: Command | None = None
    """Program that gets the message on its standard input. Never a shell line."""
    format: Literal["json", "slack", "ntfy"] = "json"
    """Shape of the message: `json` with every field, `slack` (also Mattermost, Discord's /slack), `ntfy`."""
    headers: Annotated[dict[str, Header], Empty] = Field(default_factory=dict)
    """Headers added to the request, such as `Authorization`; treated as secrets."""


class MetricsModel(Model):
    """The page of Prometheus metrics."""

    port: Port
    """Loopback port that the daemon serves `/metrics` on."""


class FailureModel(Model):
    """A way in which an engine fails, told from the end of its log."""

    pattern: Text
    """Regular expression."""
    kind: Text
    """A class in CamelCase."""
    hint: Text
    """What to do about it."""


class EngineCallModel(Model):
    """One call on an engine's own port."""

    path: UrlPath
    """Path, with its query: `/sleep?level=1`."""
    method: Literal["POST", "PUT", "PATCH", "GET"] = "POST"
    """How it is called."""
    body: Any = None
    """Sent as JSON. Default: nothing."""
    status: Annotated[Count, Ge(100), Le(599)] | None = None
    """Status that it is answered with. Default: any 2xx."""
    answer: Annotated[dict[str, Word], Empty] = Field(default_factory=dict)
    """Fields that the JSON object of its answer holds, by name (`a.b`: b inside a)."""


class SleepCheckModel(Model):
    """How an engine is asked whether it sleeps: by GET; it answers with a JSON object."""

    path: UrlPath
    """Path that is asked."""
    field: Text
    """Field that tells (`a.b`: b inside a)."""
    asleep: Word = True
    """What it holds while the engine sleeps."""
    awake: Word = False
    """What it holds while the engine is awake."""


class SleepLevelModel(Model):
    """One way to give GPU memory back and keep the process."""

    sleep: Annotated[tuple[EngineCallModel, ...], Len(1)]
    """Calls that put it to sleep, in order; one that is not answered as it should ends in a stop."""
    wake: Annotated[tuple[EngineCallModel, ...], Len(1)]
    """Calls that wake it up, in order; one that is not answered as it should ends in a restart."""
    sleep_time: PositiveDuration | None = None
    """Predicted time to fall asleep, until history knows better. Default: 0.08, at level 2 0.03 of a load."""
    wake_time: PositiveDuration | None = None
    """Predicted time to wake up, until history knows better. Default: 0.1, at level 2 0.4 of a load."""


class SleepModel(Model):
    """How an engine gives its GPU memory back, and keeps its process, its port and `residual`."""

    args: Words | None = None
    """Added for endpoints with `evict: {method: sleep}`."""
    env: Annotated[dict[str, EnvValue], Empty] = Field(default_factory=dict)
    """Variables added for the same."""
    check: SleepCheckModel | None = None
    """How it is asked whether it sleeps. Default: not at all; the calls and NVML are believed."""
    level_1: SleepLevelModel | None = None
    """Its weights move to host memory."""
    level_2: SleepLevelModel | None = None
    """Its weights are dropped, and read again."""


class EngineModel(Model):
    """An engine profile of one's own. What is left out is as in `like`."""

    like: Text = "custom"
    """The profile that it is a variant of: vllm, sglang, llamacpp, tgi, tei; `custom` is an empty one."""
    executable: Text | None = None
    """Program, looked up on PATH. Required unless `like` has one."""
    args: Words | None = None
    """Always given, in place of those of `like`. {host} {port} {second_port} {model} {gpus} {gpu_count} {memory}
    {fraction} {drain} are filled in, as in the lists below and in `env`."""
    model_args: Words | None = None
    """Given first: they name the model."""
    many_gpus_args: Words | None = None
    """Added when it gets more than one GPU."""
    fraction_args: Words | None = None
    """Added when it claims less than the whole GPU."""
    drain_args: Words | None = None
    """Added when requests in flight may finish (`stop.drain`)."""
    env: Annotated[dict[str, EnvValue], Empty] = Field(default_factory=dict)
    """Variables it is always started with."""
    health_path: UrlPath | None = None
    """Answers 200 when ready."""
    metrics_path: UrlPath | None = None
    """A page of Prometheus metrics."""
    busy_metrics: Metrics | None = None
    """Their sum is the number of requests running and waiting."""
    running_metrics: Metrics | None = None
    """Their sum is the number of requests that are being worked on."""
    progress_metrics: Metrics | None = None
    """Counters that grow while any request is worked on."""
    stop_signal: Signal | None = None
    """Unless the endpoint's `stop.signal` says otherwise."""
    grace: Duration | None = None
    """Unless the endpoint's `stop.grace` says otherwise."""
    startup: PositiveDuration | None = None
    """Unless the endpoint's `health.startup` says otherwise."""
    load: PositiveDuration | None = None
    """Predicted time from start to ready, until history knows better."""
    sleep: SleepModel | None = None
    """How it sleeps and wakes up."""
    residual: Size | None = None
    """Memory that it keeps on each GPU while it sleeps. Default: 1536MiB."""
    titles: Words | None = None
    """Regular expressions of its processes' titles."""
    failures: tuple[FailureModel, ...] = ()
    """What its log says when it fails; looked at before those of `like`."""


class SetpointsModel(Model):
    """The set points of one box: what should run on its GPUs."""

    version: Version
    """Version of this format."""
    node: NodeModel = Field(default_factory=NodeModel.model_construct)
    """The box itself."""
    priorities: Annotated[dict[str, PriorityNumber], Empty] = Field(default_factory=dict)
    """Names usable wherever a priority stands."""
    capabilities: Annotated[dict[str, CapabilityModel], Empty] = Field(default_factory=dict)
    """Floors of what endpoints offer."""
    defaults: EndpointModel = Field(default_factory=EndpointModel.model_construct)
    """Fields that every endpoint has unless it says otherwise."""
    policy: PolicyModel = Field(default_factory=PolicyModel.model_construct)
    """Brakes against thrashing; the defaults suit most boxes."""
    overlays: Text = "overlays/"
    """Folder of overlay files, relative to this file."""
    engines: Annotated[dict[str, EngineModel], Empty] = Field(default_factory=dict)
    """Engine profiles of one's own, by name; usable as an endpoint's `engine`."""
    notify: Annotated[dict[str, NotifierModel], Empty] = Field(default_factory=dict)
    """Who is told of incidents, by name."""
    metrics: MetricsModel | None = None
    """The page of Prometheus metrics. Default: none."""
    endpoints: Annotated[dict[str, EndpointModel], Empty] = Field(default_factory=dict)
    """The baseline, by name."""

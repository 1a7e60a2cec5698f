"""The overlay file as pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from reconciler.spec.models import Empty, EndpointModel, LogsModel, Model, StopModel
from reconciler.spec.values import (
    Command,
    Count,
    Duration,
    EnvValue,
    Flag,
    Gpus,
    Memory,
    Moment,
    Names,
    PositiveDuration,
    Priority,
    Text,
    Version,
)

DEFAULT_PRIORITY = 100
"""Below an endpoint's default: an overlay displaces nothing unless its file says that it matters more."""


class MakespanModel(Model):
    """When an overlay runs, and for how long."""

    start: Moment | None = None
    """When to begin. Default: as soon as the file is seen."""
    duration: PositiveDuration | None = None
    """How long it is expected to take. Required unless `deadline` is given."""
    grace: Duration | None = None
    """How far past `duration` is still no overrun. Default: a tenth of it, at least 1m."""
    on_overrun: Literal["continue", "stop"] = "continue"
    """Past duration and grace: let the work complete (and say so), or stop it."""
    deadline: Moment | None = None
    """Hard end."""
    schedule: Text | None = None
    """Cron expression of five fields, instead of `start`; needs `timezone`."""
    timezone: Text | None = None
    """IANA time zone of `schedule`, and of times without an offset."""
    starting_deadline: PositiveDuration = 3600.0
    """How late a missed start may still be made up for, once."""


class WorkloadModel(Model):
    """A command that is run to completion."""

    command: Command
    """Program and arguments; a list, never a shell line."""
    env: Annotated[dict[str, EnvValue], Empty] = Field(default_factory=dict)
    """Variables added to its environment."""
    env_file: Text | None = None
    """File of KEY=VALUE lines, relative to this file; its values are never shown."""
    cwd: Text | None = None
    """Working directory, relative to this file. Default: the folder of this file."""
    user: Text | None = None
    """User that it runs as, which only root may choose. Default: the one who runs reconciler."""
    retries: Annotated[Count, Ge(0), Le(1000)] = 0
    """How often it is tried again after a failure, while time remains."""
    preemptible: Flag = False
    """Whether a higher overlay may end it."""
    stop: StopModel = Field(default_factory=StopModel.model_construct)
    """How it is asked to end."""
    logs: LogsModel = Field(default_factory=LogsModel.model_construct)
    """How much of its output is kept."""


class OverlayModel(Model):
    """One file that changes the desired state for a while; its name is the file's stem."""

    version: Version
    """Version of this format."""
    priority: Priority = DEFAULT_PRIORITY
    """Bigger is more important; a number, or a name from the set points' `priorities`."""
    allow_baseline_eviction: Flag = False
    """Whether endpoints of lower priority may be displaced for it."""
    makespan: MakespanModel
    """When it runs, and for how long."""
    gpus: Gpus | None = None
    """How many GPUs, all or none, or exactly which (`[5]`)."""
    memory: Memory | None = None
    """Memory on each GPU. Default: the whole GPU, exclusively."""
    requires: Names = ()
    """Capabilities that must be ready while it runs; their URLs are handed to the workload."""
    workload: WorkloadModel | None = None
    """What is run. Leave it out for a pure reservation."""
    set: Annotated[dict[str, EndpointModel], Empty] = Field(default_factory=dict)
    """Endpoint set points changed while it lasts; an entry of a new name is a temporary endpoint."""
    on_edit: Literal["wait", "replace"] = "wait"
    """An edit of placement or command while it runs waits for its end, or replaces it."""

"""One endpoint: from its merged text to an `EndpointSpec`."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.errors import suggest
from reconciler.spec.digests import digest, process_hash
from reconciler.spec.env_file import parse_env_file
from reconciler.spec.findings import Findings, clip
from reconciler.spec.models import EndpointModel, HealthModel, LogsModel, RestartModel, StopModel
from reconciler.spec.profiles import PROFILES, EngineProfile
from reconciler.spec.spec import (
    EndpointSpec,
    Evict,
    GpuClaim,
    GpuCount,
    GpuPins,
    Health,
    Logs,
    Restart,
    Source,
    Stop,
    WholeGpu,
)
from reconciler.spec.tree import Entry, Map, Node, Scalar, Sequence, child, locate
from reconciler.spec.trust import UntrustedError
from reconciler.units import counted, format_duration

ReadEnvFile = Callable[[str], bytes]
"""Content of an absolute path.

Raises:
    OSError: it cannot be read; `strerror` says why.
"""

_PLACEHOLDER = re.compile(r"\{(port|model)\}")


class Context(Struct, frozen=True):
    """What names mean while one file is resolved."""

    findings: Findings
    priorities: Mapping[str, int] | None
    """None: the set points are broken, names cannot be looked up and are not complained about."""
    node_gpus: tuple[int | str, ...] | None
    read_env_file: ReadEnvFile
    engines: Mapping[str, EngineProfile | None] = field(default_factory=dict)
    """Profiles that the set points define; None: it is broken, and what uses it is not complained about."""
    secrets: dict[str, str | None] = field(default_factory=dict)
    """Digests of the `env_file`s read so far; None: could not be read."""

    def priority(self, value: int | str, at: Source) -> int:
        """A priority as a number."""
        if isinstance(value, int):
            return value
        if self.priorities is None:
            return 0
        if value not in self.priorities:
            hint = suggest(value, self.priorities) or "define it under `priorities`, or write a number"
            self.findings.add(at, f'unknown priority "{clip(value)}"', hint)
            return 0
        return self.priorities[value]

    def check_gpus(self, claim: GpuClaim, at: Source) -> None:
        """Note a claim that `node.gpus` cannot serve."""
        if self.node_gpus is None:
            return
        usable = ", ".join(map(str, self.node_gpus)) or "none"
        match claim:
            case GpuCount(count):
                if count > len(self.node_gpus):
                    message = f"{counted(count, 'GPU is', 'GPUs are')} wanted, node.gpus has {len(self.node_gpus)}"
                    self.findings.add(at, message, f"usable: {usable}")
            case GpuPins(refs):
                for ref in refs:
                    # an index cannot be compared with a UUID before the box is seen
                    comparable = all(isinstance(other, int) == isinstance(ref, int) for other in self.node_gpus)
                    if comparable and ref not in self.node_gpus:
                        self.findings.add(at, f"GPU {ref} is not in node.gpus", f"usable: {usable}")

    def env_file(self, value: str | None, at: Source) -> tuple[str | None, str | None]:
        """Absolute path of an `env_file` and the digest of its meaning."""
        if value is None:
            return None, None
        path = absolute(value, at)
        if path not in self.secrets:
            self.secrets[path] = None
            try:
                self.secrets[path] = digest(parse_env_file(self.read_env_file(path)))
            except OSError as error:
                hint = error.hint if isinstance(error, UntrustedError) else None
                self.findings.add(at, f"env_file {path}: {error.strerror or 'cannot be read'}", hint)
            except ValueError as error:
                self.findings.add(at, f"env_file {path} {error}", "write KEY=VALUE lines")
        elif self.secrets[path] is None:
            self.findings.add(at, f"env_file {path} cannot be used")
        return path, self.secrets[path]

    def check_user(self, name: str | None, at: Source) -> None:
        """Note a user that does not exist, or that this process may not become."""
        if name is None:
            return
        try:
            wanted = pwd.getpwnam(name).pw_uid
        except (KeyError, ValueError):
            self.findings.add(at, f'there is no user "{clip(name)}" on this box', "name one of /etc/passwd")
            return
        if os.geteuid() not in (0, wanted):
            hint = "run reconciler as root, or leave `user` out"
            self.findings.add(at, f'only root may run things as another user, here "{clip(name)}"', hint)


def absolute(value: str, at: Source) -> str:
    """A path relative to the folder of the file it was written in, made absolute."""
    try:
        expanded = Path(value).expanduser()
    except RuntimeError:  # no home for that user: the name is taken as it is
        expanded = Path(value)
    return str(Path(at.file).absolute().parent.joinpath(expanded))


def merge(base: Node | None, over: Node) -> Node:
    """`over` laid on `base`: mappings key by key, everything else replaced."""
    if isinstance(over, Scalar) and over.value is None and isinstance(base, Map):
        return Map(base.entries, over.at)
    if not isinstance(base, Map) or not isinstance(over, Map):
        return over
    entries = dict(base.entries)
    for name, entry in over.entries.items():
        below = entries.get(name)
        entries[name] = Entry(entry.key_at, merge(below.node, entry.node)) if below else entry
    return Map(entries, over.at)


def weight(node: Node) -> int:
    """Roughly how many characters a node holds."""
    match node:
        case Scalar():
            return 8 + len(node.text)
        case Sequence():
            return 8 + sum(weight(item) for item in node.items)
        case Map():
            return 8 + sum(len(name) + weight(entry.node) for name, entry in node.entries.items())


def resolve_endpoint(
    name: str, model: EndpointModel, node: Node, key_at: Source, context: Context, *, home: Source | None = None
) -> EndpointSpec:
    """The endpoint with every default applied; what is wrong with it goes to `context.findings`.

    Args:
        name: its name.
        model: its validated fields, `defaults` merged in.
        node: the text of these fields.
        key_at: where its name was written.
        context: what names mean.
        home: where its own folder is taken from, if not from `key_at`: a patched endpoint stays where it was.
    """

    def at(*path: str | int) -> Source:
        return locate(node, path) if child(node, *path) is not None else key_at

    findings = context.findings
    own = context.engines.get(model.engine)
    profile = own or PROFILES.get(model.engine)
    if profile is not None:
        _check_engine(name, model, node, key_at, profile, findings)
    elif model.engine not in context.engines:
        hint = suggest(model.engine, (*PROFILES, *context.engines))
        findings.add(at("engine"), f'unknown engine "{clip(model.engine)}"', hint)
    findings.check_variables(child(node, "env"))
    context.check_user(model.user, at("user"))
    gpus = model.gpus if model.gpus is not None else GpuCount(1)
    if model.movable and home is None and (isinstance(gpus, GpuPins) or not gpus.count):
        why = "it is pinned to its GPUs" if gpus.count else "it needs no GPU"
        hint = "leave `movable` out, or write how many GPUs it needs instead of which: `gpus: 1`"
        findings.add(at("movable"), f"`movable: true`, and {why}: there is nowhere else to move to", hint)
    context.check_gpus(gpus, at("gpus"))
    if model.restart.initial > model.restart.max:
        written = "initial" if "initial" in model.restart.model_fields_set else "max"
        initial, longest = format_duration(model.restart.initial), format_duration(model.restart.max)
        message = f"`restart.initial` is {initial} and `restart.max`, the longest wait, is {longest}"
        findings.add(at("restart", written), message, "make `initial` shorter, or `max` longer")
    env_file, secrets = context.env_file(model.env_file, at("env_file"))
    health, ending = _health(model.health), stop(model.stop)
    if profile:  # the engine's own, where nothing is written
        health = replace(
            health,
            path=model.health.path or profile.health_path,
            startup_s=health.startup_s if "startup" in model.health.model_fields_set else profile.startup_s,
        )
        ending = replace(
            ending,
            signal=ending.signal if "signal" in model.stop.model_fields_set else profile.stop_signal,
            grace_s=ending.grace_s if "grace" in model.stop.model_fields_set else profile.grace_s,
        )
    endpoint = EndpointSpec(
        name=name,
        model=model.model,
        engine=model.engine,
        executable=model.executable,
        capabilities=model.capabilities,
        gpus=gpus,
        memory=model.memory if model.memory is not None and gpus.count else WholeGpu(),
        port=model.port,
        priority=context.priority(model.priority, at("priority")),
        state=model.state,
        preemptible=model.preemptible,
        movable=model.movable,
        evict=Evict(model.evict.method, 2 if model.evict.level == 2 else 1, model.evict.weights),
        args=model.args,
        command=model.command,
        env=dict(sorted(model.env.items())),
        env_file=env_file,
        cwd=absolute(model.cwd, at("cwd")) if model.cwd else absolute(".", home or key_at),
        health=health,
        stop=ending,
        restart=_restart(model.restart),
        process_hash="",
        source=key_at,
        logs=logs(model.logs),
        own_profile=own,
        user=model.user,
    )
    return replace(endpoint, process_hash=process_hash(endpoint, secrets))


def _check_engine(
    name: str, model: EndpointModel, node: Node, key_at: Source, profile: EngineProfile, findings: Findings
) -> None:
    def at(*path: str | int) -> Source:
        return locate(node, path) if child(node, *path) is not None else key_at

    if profile.executable is None:
        _check_custom(name, model, node, key_at, findings)
    else:
        if child(node, "model") is None:
            findings.add(key_at, f'endpoint "{name}" has no model', "write `model:`, what it serves")
        if child(node, "port") is None:
            findings.add(key_at, f'endpoint "{name}" has no port', "write `port:`, where it listens")
        if model.command is not None:
            findings.add(
                at("command"), f"engine {profile.name} builds its own command", "use args, or `engine: custom`"
            )
        for index, part in enumerate(model.args):
            if part == "--port" or part.startswith("--port="):
                findings.add(at("args", index), "args may not set the port", "write it as `port:`")
        _check_port_is_told(name, model, at("engine"), profile, findings)
    if model.evict.method == "sleep" and not profile.sleeps:
        able = ", ".join(sorted(other.name for other in PROFILES.values() if other.sleeps))
        hint = f"use stop; {able} can sleep, and so can one of your own that says how (`engines:`)"
        findings.add(at("evict", "method"), f"engine {profile.name} cannot sleep", hint)
    elif model.evict.method == "sleep" and model.evict.level > max(profile.sleep_levels):
        message = f"engine {profile.name} has no sleep level {model.evict.level}"
        findings.add(at("evict", "level"), message, f"write `level: {max(profile.sleep_levels)}`")


def _check_port_is_told(
    name: str, model: EndpointModel, at: Source, profile: EngineProfile, findings: Findings
) -> None:
    """Note that a variant of an engine replaced the arguments that tell the port: nothing would listen there."""
    base = PROFILES.get(profile.like or "")
    if base is None or not base.tells_port or profile.tells_port or model.port is None:
        return
    if not any(str(model.port) in part for part in (*model.args, *model.env.values())):
        message = (
            f'endpoint "{name}" is not told its port: the args of engine {profile.name} replace those of {base.name}'
        )
        hint = f"write {{port}} into the args (or env) of the engine; {base.name} has: {' '.join(base.base_args)}"
        findings.add(at, message, hint)


def _check_custom(name: str, model: EndpointModel, node: Node, key_at: Source, findings: Findings) -> None:
    if child(node, "command") is None:
        findings.add(key_at, f'endpoint "{name}" has engine custom and no command', 'write `command: ["program"]`')
    for index, part in enumerate(model.command or ()):
        for placeholder in _PLACEHOLDER.findall(part):
            if child(node, placeholder) is None:
                message = f"the command wants {{{placeholder}}}, and the endpoint has no {placeholder}"
                findings.add(locate(node, ("command", index)), message, f"write `{placeholder}:`")
    if model.executable is not None:
        at = locate(node, ("executable",))
        findings.add(at, "engine custom takes no executable", "write it as the first item of command")


def stop(model: StopModel) -> Stop:
    """`stop` of an endpoint or a workload."""
    return Stop(model.signal, model.drain, model.grace)


def logs(model: LogsModel) -> Logs:
    """`logs` of an endpoint or a workload."""
    return Logs(model.max, model.keep)


def _health(model: HealthModel) -> Health:
    return Health(
        path=model.path or Health().path,
        interval_s=model.interval,
        timeout_s=model.timeout,
        failures=model.failures,
        startup_s=model.startup,
        unhealthy_for_s=model.unhealthy_for,
        hung_s=model.hung,
    )


def _restart(model: RestartModel) -> Restart:
    return Restart(model.initial, model.max, model.reset_after, model.max_restarts, model.window)

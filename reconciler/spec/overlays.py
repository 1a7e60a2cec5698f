"""One overlay file: read, laid on the baseline, resolved; and what an edit may change while it runs."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.errors import Problem, SpecError, suggest
from reconciler.spec.checks import check_pins, check_ports
from reconciler.spec.digests import canonical, digest
from reconciler.spec.document import parse
from reconciler.spec.endpoints import Context, ReadEnvFile, absolute, logs, merge, resolve_endpoint, stop
from reconciler.spec.findings import Findings
from reconciler.spec.makespan import resolve_makespan
from reconciler.spec.models import EndpointModel
from reconciler.spec.overlay_models import OverlayModel
from reconciler.spec.profiles import EngineProfile
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Source, WholeGpu, Workload
from reconciler.spec.texts import SourceText
from reconciler.spec.tree import Entry, Map, Node, Scalar, child, locate


class Baseline(Struct, frozen=True):
    """What an overlay is laid on."""

    endpoints: Mapping[str, EndpointSpec]
    texts: Mapping[str, Node]
    """Text of each endpoint, defaults merged in."""
    defaults: Node | None
    priorities: Mapping[str, int] | None
    """None: the set points are broken; only what does not depend on them is checked."""
    node_gpus: tuple[int | str, ...] | None
    engines: Mapping[str, EngineProfile | None] = field(default_factory=dict)
    """Profiles that the set points define."""


def resolve_overlay(source: SourceText, baseline: Baseline, read_env_file: ReadEnvFile) -> OverlaySpec:
    """The overlay in one file.

    Raises:
        SpecError: every problem of the file.
    """
    findings = Findings()
    text = strip_extensions(parse(source.text, source.path))
    top = Source(source.path, 1, 1)
    findings.check_name(top, "overlay", source.name)
    context = Context(findings, baseline.priorities, baseline.node_gpus, read_env_file, baseline.engines)
    model = findings.validate(OverlayModel, text) or findings.salvage(OverlayModel, text, _stand_ins(top))
    overlay = None if model is None else _resolve(source.name, model, text, baseline, context)
    if findings or overlay is None:
        raise SpecError(tuple(_in_own_file(problem, text, source.path) for problem in findings))
    return overlay


def _stand_ins(at: Source) -> dict[str, Entry]:
    """Sound values for what an overlay must have, where its own are broken."""
    duration = Map({"duration": Entry(at, Scalar("1m", "1m", at))}, at)
    return {"version": Entry(at, Scalar(1, "1", at)), "makespan": Entry(at, duration)}


def strip_extensions(text: Map) -> Map:
    """Without `x-…` keys at the top: a place for anchors and notes, as in Compose files."""
    return Map({name: entry for name, entry in text.entries.items() if not name.startswith("x-")}, text.at)


def merge_live_edit(running: OverlaySpec, edited: OverlaySpec) -> OverlaySpec:
    """What an edit changes at once while the overlay runs: its end, its priority and its policies.

    Placement, command, `set` and `requires` stay as they run, and with them `placement_hash`; `change_pending` says
    that the file wants others.
    """
    makespan = replace(
        running.makespan,
        duration_s=edited.makespan.duration_s,
        grace_s=edited.makespan.grace_s,
        deadline=edited.makespan.deadline,
        on_overrun=edited.makespan.on_overrun,
    )
    workload = running.workload
    if workload is not None and edited.workload is not None:
        policies = edited.workload
        workload = replace(workload, retries=policies.retries, preemptible=policies.preemptible, stop=policies.stop)
    return replace(
        edited,
        makespan=makespan,
        gpus=running.gpus,
        memory=running.memory,
        requires=running.requires,
        workload=workload,
        endpoints=running.endpoints,
        placement_hash=running.placement_hash,
        change_pending=running.placement_hash != edited.placement_hash,
    )


def _resolve(name: str, model: OverlayModel, text: Map, baseline: Baseline, context: Context) -> OverlaySpec:
    findings = context.findings
    first = next(iter(text.entries.values()), None)
    top = first.key_at if first else text.at  # `{}` holds nothing to point at

    def at(*path: str | int) -> Source:
        return locate(text, path)

    if not {"gpus", "workload", "set", "requires"} & set(text.entries):
        hint = "give it gpus, a workload, `set`, or `requires`"
        findings.add(top, "the overlay asks for nothing", hint)
    if model.gpus is not None:
        context.check_gpus(model.gpus, at("gpus"))
        if model.gpus.count == 0 and not {"workload", "set", "requires"} & set(text.entries):
            findings.add(at("gpus"), "a reservation of no GPUs asks for nothing", "write how many GPUs it needs")
    no_gpus = child(text, "gpus") is None or (model.gpus is not None and model.gpus.count == 0)
    if model.memory is not None and no_gpus:
        findings.add(at("memory"), "memory is claimed, and no GPUs", "say on how many: `gpus: 1`")
    endpoints, patches = _endpoints(model, text, baseline, context)
    if baseline.priorities is not None:
        _check_requires(text, {**baseline.endpoints, **endpoints}, findings)
    makespan_text = child(text, "makespan")
    makespan = resolve_makespan(model.makespan, makespan_text or Map({}, text.at), findings)
    workload, secrets = _workload(model, text, context)
    process: tuple[object, ...] | None = None
    if workload is not None:
        process = (workload.command, workload.env, workload.env_file, secrets, workload.cwd)
        process += (workload.user,) if workload.user else ()
    return OverlaySpec(
        name=name,
        priority=context.priority(model.priority, at("priority")),
        allow_baseline_eviction=model.allow_baseline_eviction,
        makespan=makespan,
        gpus=model.gpus,
        memory=model.memory if model.memory is not None else WholeGpu(),
        requires=model.requires,
        workload=workload,
        endpoints=dict(sorted(endpoints.items())),
        on_edit=model.on_edit,
        placement_hash=digest([model.gpus, model.memory, process, model.requires, patches]),
        source=top,
    )


def _endpoints(
    model: OverlayModel, text: Map, baseline: Baseline, context: Context
) -> tuple[dict[str, EndpointSpec], dict[str, object]]:
    """`set`, resolved; and what each patch itself says, for `placement_hash`.

    The hash covers the patch and not the endpoint below it: an edit of the baseline is no edit of the overlay.
    """
    resolved: dict[str, EndpointSpec] = {}
    patches: dict[str, object] = {}
    texts: dict[str, Node] = {}
    node = child(text, "set")
    for name, entry in node.entries.items() if isinstance(node, Map) else ():
        if not context.findings.check_name(entry.key_at, "endpoint", name):
            continue
        known = baseline.endpoints.get(name)
        if known is None and (baseline.priorities is None or name in baseline.texts):
            continue  # the endpoint below is broken itself, and says so
        if known is None and not _is_complete(entry.node):
            hint = "; ".join(filter(None, (suggest(name, baseline.endpoints), "a new endpoint must be complete")))
            context.findings.add(entry.key_at, f'unknown endpoint "{name}"', hint)
            continue
        merged = merge(baseline.texts.get(name, baseline.defaults), entry.node)
        whole = context.findings.validate(EndpointModel, merged)
        if whole is None or name not in model.set:
            continue
        texts[name] = merged
        home = known.source if known else None
        resolved[name] = resolve_endpoint(name, whole, merged, entry.key_at, context, home=home)
        patches[name] = _patch(model.set[name], resolved[name], context)
    # an endpoint that the overlay stops lends its port to another
    others = {e.port: e for name, e in baseline.endpoints.items() if name not in resolved}
    check_ports((*others.values(), *(e for e in resolved.values() if e.state != "stopped")), texts, context.findings)
    check_pins(tuple(resolved.values()), texts, context.findings)
    return resolved, patches


def _is_complete(node: Node) -> bool:
    """It looks like an endpoint of its own, not like a patch."""
    return child(node, "port") is not None or child(node, "command") is not None


def _patch(model: EndpointModel, endpoint: EndpointSpec, context: Context) -> object:
    said = canonical(model)
    if isinstance(said, dict):
        if "priority" in said:
            said["priority"] = endpoint.priority
        if "cwd" in said:
            said["cwd"] = endpoint.cwd
        if model.env_file is not None:
            said["env_file"] = [endpoint.env_file, context.secrets.get(endpoint.env_file or "")]
    return said


def _workload(model: OverlayModel, text: Map, context: Context) -> tuple[Workload | None, str | None]:
    wanted = model.workload
    if wanted is None:
        return None, None
    context.findings.check_variables(child(text, "workload", "env"))
    context.check_user(wanted.user, locate(text, ("workload", "user")))
    env_file, secrets = context.env_file(wanted.env_file, locate(text, ("workload", "env_file")))
    workload = Workload(
        command=wanted.command,
        env=dict(sorted(wanted.env.items())),
        env_file=env_file,
        cwd=absolute(wanted.cwd or ".", text.at),
        retries=wanted.retries,
        preemptible=wanted.preemptible,
        stop=stop(wanted.stop),
        logs=logs(wanted.logs),
        user=wanted.user,
    )
    return workload, secrets


def _check_requires(text: Map, endpoints: Mapping[str, EndpointSpec], findings: Findings) -> None:
    offered = {name for endpoint in endpoints.values() for name in endpoint.capabilities}
    node = child(text, "requires")
    for index, name in enumerate(node_items(node)):
        if name not in offered:
            hint = suggest(name, offered) or "no endpoint offers any capability yet"
            findings.add(locate(text, ("requires", index)), f'no endpoint offers the capability "{name}"', hint)
            continue
        providers = [e for e in endpoints.values() if name in e.capabilities]
        if all(endpoint.state == "stopped" for endpoint in providers):
            listed = ", ".join(sorted(e.name for e in providers)[:10])
            message = f'every endpoint that offers "{name}" is stopped ({listed})'
            findings.add(locate(text, ("requires", index)), message, "let one of them be `running` or `standby`")


def node_items(node: Node | None) -> list[str]:
    """Texts in a list, in the order written."""
    return [str(getattr(item, "value", "")) for item in getattr(node, "items", ())]


def _in_own_file(problem: Problem, text: Map, file: str) -> Problem:
    """A problem of what the overlay is laid on is a problem of the overlay: told at its `set`."""
    if problem.file == file:
        return problem
    at = locate(text, ("set",), key=True)
    message = f"{problem.message} (from {problem.file}:{problem.line}:{problem.column})"
    return Problem(file, at.line, at.column, message, problem.hint)

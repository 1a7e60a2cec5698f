"""From files, or texts read earlier, to a `Spec`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from reconciler.errors import Problem, SpecError
from reconciler.spec.checks import check_floors, check_metrics_port, check_pins, check_ports
from reconciler.spec.digests import spec_digest
from reconciler.spec.document import parse
from reconciler.spec.endpoints import Context, merge, resolve_endpoint, weight
from reconciler.spec.findings import Findings
from reconciler.spec.models import EndpointModel, SetpointsModel
from reconciler.spec.notifiers import notifiers
from reconciler.spec.overlays import Baseline, merge_live_edit, resolve_overlay, strip_extensions
from reconciler.spec.own_engines import own_profiles
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Policy, Source, Spec
from reconciler.spec.spec import Node as NodeSpec
from reconciler.spec.texts import SourceText, Texts, read_texts
from reconciler.spec.tree import Entry, Map, Node, child, locate
from reconciler.spec.trust import read_trusted
from reconciler.units import counted

__all__ = [
    "SourceText",
    "Texts",
    "load_setpoints",
    "merge_live_edit",
    "read_texts",
    "rejected_overlays",
    "resolve",
    "resolve_texts",
]

_MOST_EXPANDED = 8 << 20
"""Characters of all endpoints with `defaults` repeated in each: what keeps a small file from becoming a large spec."""


def load_setpoints(path: str | Path) -> Spec:
    """The spec in a set-point file and its overlays folder; rejected overlay files are in `Spec.problems`.

    Raises:
        SpecError: the set points cannot be accepted; holds every problem, those of overlay files included.
    """
    texts = read_texts(path)
    try:
        spec = resolve_texts(texts.setpoints, texts.overlays or ())
    except SpecError as error:
        raise SpecError((*error.problems, *texts.problems)) from None
    return replace(spec, problems=tuple(sorted({*spec.problems, *texts.problems}, key=_order)))


def resolve_texts(setpoints: SourceText, overlays: Sequence[SourceText]) -> Spec:
    """`resolve` with this machine's name and files.

    Raises:
        SpecError: as `resolve`.
    """
    return resolve(setpoints, overlays, hostname=os.uname().nodename, read_env_file=read_trusted)


def rejected_overlays(spec: Spec) -> frozenset[str]:
    """Names of the overlays whose files are there and cannot be accepted: unknown, not absent."""
    return frozenset(Path(problem.file).stem for problem in spec.problems)


def resolve(
    setpoints: SourceText,
    overlays: Sequence[SourceText],
    *,
    hostname: str,
    read_env_file: Callable[[str], bytes],
) -> Spec:
    """The spec that the texts mean. Same texts and same `env_file` contents, same spec; their order does not matter.

    Args:
        setpoints: the set-point file.
        overlays: the overlay files; a name that appears twice is rejected in each of its files.
        hostname: name of a node that has none.
        read_env_file: content of the file at an absolute path, or OSError; kept as a digest only.

    Raises:
        SpecError: the set points cannot be accepted; holds every problem of every file.
    """
    findings = Findings()
    try:
        text = strip_extensions(parse(setpoints.text, setpoints.path))
    except SpecError as error:
        findings.extend(error.problems)
        text = Map({}, Source(setpoints.path, 1, 1))
    reading = _Setpoints(text, findings, read_env_file, hostname, parsed=not findings)
    baseline = reading.baseline()
    accepted, problems = _overlays(overlays, baseline, read_env_file)
    if findings:
        raise SpecError((*findings, *problems))
    spec = Spec(
        node=reading.node,
        policy=reading.policy,
        floors=reading.floors,
        endpoints=baseline.endpoints,
        overlays=accepted,
        digest="",
        problems=problems,
        notify=reading.notify,
        metrics_port=reading.metrics_port,
    )
    return replace(spec, digest=spec_digest(spec))


class _Setpoints:
    """One reading of the set-point file: the header first, then each endpoint by itself, then what holds between them.

    Endpoints are validated one by one so that an error in one hides no error in another.
    """

    def __init__(
        self,
        text: Map,
        findings: Findings,
        read_env_file: Callable[[str], bytes],
        hostname: str,
        *,
        parsed: bool,
    ) -> None:
        self.text, self.findings, self.read_env_file = text, findings, read_env_file
        endpoints = text.entries.get("endpoints")
        self.listed = endpoints.node.entries if endpoints and isinstance(endpoints.node, Map) else {}
        header = text.entries
        if endpoints and isinstance(endpoints.node, Map):
            header = {**header, "endpoints": Entry(endpoints.key_at, Map({}, endpoints.node.at))}
        EndpointModel.model_rebuild()  # before the model that holds it, which takes it in as it is: 3 ms
        model = findings.validate(SetpointsModel, Map(header, text.at)) if parsed else None
        self.sound = model is not None
        model = model or SetpointsModel.model_construct(version=1)
        for name, kind in (
            *((n, "priority") for n in model.priorities),
            *((n, "capability") for n in model.capabilities),
        ):
            section = "priorities" if kind == "priority" else "capabilities"
            findings.check_name(locate(text, (section, name), key=True), kind, name)
        self.priorities = dict(sorted(model.priorities.items())) if self.sound else None
        self.node = NodeSpec(model.node.name or hostname, model.node.gpus, model.node.reserve, model.node.host_reserve)
        policy = model.policy
        self.policy = Policy(policy.max_evictions_per_hour, policy.min_ready, policy.resync)
        written = child(text, "engines")
        broken = dict.fromkeys(written.entries) if isinstance(written, Map) else {}
        self.engines = {**broken, **own_profiles(model.engines, text, findings)}
        self.notify = notifiers(model.notify, text, findings)
        self.metrics_port = model.metrics.port if model.metrics else None
        self.floors = {name: item.min_available for name, item in sorted(model.capabilities.items())}

    def baseline(self) -> Baseline:
        """The endpoints; what is wrong with them goes to the findings."""
        defaults = child(self.text, "defaults")
        defaults = defaults if isinstance(defaults, Map) else None
        context = Context(self.findings, self.priorities, self.node.gpus, self.read_env_file, self.engines)
        endpoints: dict[str, EndpointSpec] = {}
        texts: dict[str, Node] = {}
        if defaults is not None and weight(defaults) * len(self.listed) > _MOST_EXPANDED:
            at = locate(self.text, ("defaults",), key=True)
            self.findings.add(at, f"defaults are too large to be repeated in {counted(len(self.listed), 'endpoint')}")
            self.listed = {}
        for name, entry in sorted(self.listed.items()):
            texts[name] = merged = merge(defaults, entry.node)
            if not self.findings.check_name(entry.key_at, "endpoint", name):
                continue
            model = self.findings.validate(EndpointModel, merged)
            if model is not None:
                endpoints[name] = resolve_endpoint(name, model, merged, entry.key_at, context)
            elif sound := self.findings.salvage(EndpointModel, merged, {}):
                resolve_endpoint(name, sound, merged, entry.key_at, context)
        whole = self.sound and len(endpoints) == len(self.listed)
        check_ports(sorted(endpoints.values(), key=lambda e: e.source), texts, self.findings)
        check_metrics_port(self.metrics_port, endpoints.values(), self.text, self.findings)
        check_pins(tuple(endpoints.values()), texts, self.findings)
        if whole:  # a floor can be judged only when every endpoint is understood
            count = None if self.node.gpus is None else len(self.node.gpus)
            check_floors(self.floors, tuple(endpoints.values()), self.text, count, self.findings)
        priorities = self.priorities if whole else None
        return Baseline(endpoints, texts, defaults, priorities, self.node.gpus, self.engines)


def _overlays(
    sources: Sequence[SourceText], baseline: Baseline, read_env_file: Callable[[str], bytes]
) -> tuple[dict[str, OverlaySpec], tuple[Problem, ...]]:
    accepted: dict[str, OverlaySpec] = {}
    problems: list[Problem] = []
    paths: dict[str, list[str]] = {}
    for source in sources:
        paths.setdefault(source.name, []).append(source.path)
    for source in sorted(sources):
        if len(paths[source.name]) > 1:
            others = ", ".join(sorted(path for path in paths[source.name] if path != source.path)) or source.path
            hint = "an overlay is named by its file: rename or remove one"
            problems.append(Problem(source.path, 1, 1, f'overlay "{source.name}" is also in {others}', hint))
            continue
        try:
            accepted[source.name] = resolve_overlay(source, baseline, read_env_file)
        except SpecError as error:
            problems.extend(error.problems)
    return dict(sorted(accepted.items())), tuple(sorted(problems, key=_order))


def _order(problem: Problem) -> tuple[str, int, int, str]:
    return problem.file, problem.line, problem.column, problem.message

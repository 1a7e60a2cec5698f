"""Reads one file of `cases/`: set points and a box in, the exact text of the plan out.

    about:      the sentence that the case shows to be true
    gpus:       sizes of the GPUs: [80GiB, 80GiB], or 4x80GiB
    numa:       {GPU: node}
    islands:    {GPU: NVLink island}
    setpoints:  text of setpoints.yaml
    overlays:   {name: text of the file}
    runs:       what runs when the first look is taken, with a past of an hour; endpoint or overlay by name:
                  ask: [2]                               ready on these GPUs
                  ask: {gpus: [2], starting: 10s}          started so long ago, not ready yet
                  ask: {gpus: [2], silent: 90s}            was ready, has not answered for so long
                  ask: {gpus: [2], stopping: 5s, busy: 2}  asked to stop so long ago, requests in flight
                  ask: {gpus: [2], ended: 1s, exit: 0}     ended so long ago; `keeps: true`: memory not back yet
                  ask: {gpus: [2], unverified: true}       its process could not be verified
                  any of them with `model: NAME`         started for another version
    box:        {foreign: {GPU: size}, unknown: [GPU], lost: [GPU], sick: [GPU], ports: {port: command}}
    remembered: {ends: {endpoint: [ago, …]}, evictions: {endpoint: [ago, …]}, quarantined: {GPU: reason}}
    behaviour:  fields of `plant.Behaviour`
    given:      what happens before the plan is asked for, in order:
                  settle | {until: {overlay: state}} | {wait: 5m} | {setpoints: text} | {overlays: {name: text | null}}
                  | {box: …}
    plan:       the text expected

Times in files: it is 2026-11-23T21:00:00Z when a case begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from builders import NOW, foreign, incarnation, uuid
from msgspec import Struct
from msgspec.structs import replace
from plant import Behaviour, Plant, Run, overlay_state

from reconciler.plan.ledger import EndpointRecord, Exit, Quarantine
from reconciler.plan.observed import PortHolder, StopProgress
from reconciler.plan.render import gpu_indices, render_plan
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Spec
from reconciler.units import parse_duration, parse_size

CASES = Path(__file__).parent / "cases"
_EXPECTED = "\nplan: |\n"


class Case(Struct):
    """One file."""

    path: Path
    content: dict[str, Any]

    @property
    def expected(self) -> str:
        """The plan's text as the file has it."""
        return str(self.content.get("plan", "")).rstrip("\n")

    def run(self) -> str:
        """The plan's text as it is."""
        run = _Past(self.content).run
        decided = run.decide()
        return render_plan(decided, gpu_indices(run.plant.observe()))

    def rewrite(self, text: str) -> None:
        """Have the file expect `text`."""
        head = self.path.read_text().partition(_EXPECTED)[0].rstrip("\n")
        body = "".join(f"  {line}".rstrip() + "\n" for line in text.splitlines())
        self.path.write_text(head + _EXPECTED + body)


def read_cases() -> list[Case]:
    """All of them, by name."""
    return [Case(path, yaml.safe_load(path.read_text())) for path in sorted(CASES.glob("*.yaml"))]


def read_spec(setpoints: str, overlays: Mapping[str, str]) -> Spec:
    """What the real loader makes of the texts."""
    files = [SourceText(f"overlays/{name}.yaml", text) for name, text in overlays.items()]
    found = resolve(SourceText("setpoints.yaml", setpoints), files, hostname="box", read_env_file=lambda _: b"")
    assert not found.problems, "\n".join(map(str, found.problems))
    return found


class _Past:
    """Brings a run to the moment at which the plan is asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.setpoints: str = content["setpoints"]
        self.overlays: dict[str, str] = dict(content.get("overlays", {}))
        plant = Plant(totals=_sizes(content.get("gpus", "4x80GiB")), numa=content.get("numa", {}))
        plant.islands = content.get("islands", {})
        plant.behaviour = Behaviour(**content.get("behaviour", {}))
        self.run = Run(read_spec(self.setpoints, self.overlays), plant)
        for name, state in content.get("runs", {}).items():
            self._runs(name, state if isinstance(state, dict) else {"gpus": state})
        self._box(content.get("box", {}))
        self._remember(content.get("remembered", {}))
        for step in content.get("given", []):
            self._happen(step)

    def _happen(self, step: Any) -> None:
        run = self.run
        match step:
            case "settle":
                run.settle()
            case {"until": states}:
                run.settle(until=lambda p: all(overlay_state(n, s)(p) for n, s in states.items()))
            case {"wait": duration}:
                run.plant.advance(parse_duration(duration))
            case {"setpoints": text}:
                self.setpoints = text
            case {"overlays": edits}:
                merged = {**self.overlays, **edits}
                self.overlays = {n: t for n, t in merged.items() if t is not None}
            case {"box": fields}:
                self._box(fields)
            case _:
                raise AssertionError(f"a case cannot {step}")
        run.spec = read_spec(self.setpoints, self.overlays)

    def _spec_of(self, name: str) -> EndpointSpec | OverlaySpec:
        spec = self.run.spec
        return spec.endpoints.get(name) or spec.overlays[name]

    def _runs(self, name: str, state: dict[str, Any]) -> None:
        plant, of = self.run.plant, self._spec_of(name)
        indices = state["gpus"]
        seconds = {k: parse_duration(str(v)) for k, v in state.items() if k in _TIMES}
        began = NOW.plus(-seconds.get("starting", 3600))
        fields: dict[str, Any] = {"started": began, "pid": 4000 + len(plant.incarnations)}
        if "model" in state:
            fields["process_hash"] = f"for {state['model']}"
        if "stopping" in state:
            fields["stop"] = StopProgress(NOW.plus(-seconds["stopping"]), drained=False, signalled=None)
        if "ended" in state:
            ended = {"phase": "exited", "exit_code": state.get("exit", 1), "exited": NOW.plus(-seconds["ended"])}
            fields.update(ended, pid=None)
        if state.get("unverified"):
            fields["phase"] = "unknown"
        total = plant.totals[indices[0]] if indices else 0
        started = incarnation(of, indices, total=total, **fields)
        plant.incarnations.append(started)
        if state.get("keeps"):
            plant.frees_at[started.id] = float("inf")
        if "starting" in state or isinstance(of, OverlaySpec):
            return
        if "silent" in state:
            plant.misses[started.id] = (int(seconds["silent"] // 5), NOW.mono - seconds["silent"])
        plant.ready_at[started.id] = began.mono + 60
        plant.busy[started.id] = state.get("busy", 0)
        since = began.plus(60)
        record = EndpointRecord(name, "healthy", since, ready_incarnation=started.id, ready_since=since)
        self._record(replace(record, last_gpus=started.gpus))

    def _record(self, record: EndpointRecord) -> None:
        ledger = self.run.ledger
        self.run.ledger = replace(ledger, endpoints={**ledger.endpoints, record.name: record})

    def _box(self, box: dict[str, Any]) -> None:
        plant = self.run.plant
        for index, size in box.get("foreign", {}).items():
            plant.foreign[index] = [foreign(900 + index, parse_size(size))] if size else []
        fields = {
            "unknown": {"state": "unknown", "detail": "the driver did not answer in time"},
            "lost": {"state": "lost", "detail": "it has fallen off the bus"},
            "sick": {"healthy": False, "detail": "row remapping pending"},
        }
        for kind, values in fields.items():
            plant.overrides.update({index: dict(values) for index in box.get(kind, [])})
        for port, command in box.get("ports", {}).items():
            plant.ports[port] = PortHolder(port, 77, command)

    def _remember(self, remembered: dict[str, Any]) -> None:
        run = self.run
        for name, times in remembered.get("ends", {}).items():
            ago = [parse_duration(t) for t in times]
            exits = tuple(Exit(f"{name}-old-{i}", NOW.plus(-t), 1, planned=False) for i, t in enumerate(ago))
            record = run.ledger.endpoints.get(name) or EndpointRecord(name)
            self._record(replace(record, exits=exits, streak=len(exits)))
        for name, times in remembered.get("evictions", {}).items():
            record = run.ledger.endpoints.get(name) or EndpointRecord(name)
            self._record(replace(record, evictions=tuple(NOW.wall - parse_duration(t) for t in times)))
        quarantined = {
            uuid(index): Quarantine(uuid(index), NOW.plus(-600), reason)
            for index, reason in remembered.get("quarantined", {}).items()
        }
        run.ledger = replace(run.ledger, quarantines=quarantined)


_TIMES = ("starting", "silent", "stopping", "ended")


def _sizes(gpus: str | list[str]) -> list[int]:
    if isinstance(gpus, list):
        return [parse_size(size) for size in gpus]
    count, _, size = gpus.partition("x")
    return [parse_size(size)] * int(count)

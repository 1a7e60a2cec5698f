"""The last step before a start: it is launched as it was planned, with what runs at this moment, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import ActError
from reconciler.loop.launching import launch_of
from reconciler.loop.specs import SpecKeeper
from reconciler.plan.actions import Action, Cause
from reconciler.plan.departures import stop_for
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Gpu, Incarnation, Observed, Probe, Subject
from reconciler.spec.spec import Spec, Stop

NOW = Instant(1000.0, 1000.0)
SETPOINTS = """\
version: 1
endpoints:
  chat: {engine: custom, command: [serve], gpus: [0], port: 8080, capabilities: [long-text]}
  mute: {engine: custom, command: [serve], gpus: [1], port: 8081}
"""
OVERLAY = """\
version: 1
makespan: {duration: 5m}
gpus: 1
requires: [long-text]
workload: {command: [render]}
"""
URL = "RECONCILER_CAPABILITY_LONG_TEXT_URL"
GPU = Gpu(3, "GPU-3", "A", "ok", 80 << 30, 0, (), "", healthy=True, at=NOW)
WORK = Action(
    1, (), "start_workload", Subject("workload", "job"), ("GPU-3",), "it may run", Cause("overlay"), 30.0, (0.0, 1.0),
    ready=True, memory_bytes=(80 << 30,), attempt=2,
)  # fmt: skip
CHAT = replace(WORK, op="start", subject=Subject("endpoint", "chat"), attempt=0)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    (tmp_path / "overlays").mkdir()
    (tmp_path / "setpoints.yaml").write_text(SETPOINTS)
    (tmp_path / "overlays" / "job.yaml").write_text(OVERLAY)
    return SpecKeeper(tmp_path / "setpoints.yaml", {}, transform=None).load(Ledger()).spec


def running(name: str, *, kind: Any = "endpoint", port: int | None = 8080, ready: bool | None = True) -> Observed:
    one = Incarnation(
        "i-1", Subject(kind, name), "hash", (), (), exclusive=True, port=port, started=NOW, phase="running", pid=1,
        strays=(), exit_code=None, exited=None,
    )  # fmt: skip
    probe = Probe("i-1", NOW, ready=ready, misses=0, failing_since=None, ready_since=None)
    return Observed(NOW, "boot", (GPU,), (one,), {"i-1": probe})


def launched(action: Action, spec: Spec, observed: Observed) -> Any:
    return launch_of(action, spec, observed, inherited={}, simulated={})


def test_work_is_told_where_what_it_requires_answers_and_which_gpus_it_has(spec: Spec) -> None:
    made = launched(WORK, spec, running("chat"))
    assert made.env[URL] == "http://127.0.0.1:8080"
    assert made.env["RECONCILER_GPUS"] == "3"
    assert (made.argv, made.port, made.attempt) == (("render",), None, 2)


@pytest.mark.parametrize(
    "observed",
    [
        running("chat", ready=False),
        running("chat", ready=None),
        running("chat", port=None),
        running("mute", port=8081),
        running("gone"),
        running("chat", kind="workload"),
        replace(running("chat"), probes={}),
        replace(running("chat"), incarnations=()),
    ],
    ids=["not ready", "not asked", "no port", "without it", "not described", "no endpoint", "no answer", "nobody"],
)
def test_who_does_not_provide_it_at_this_moment_is_not_named(spec: Spec, observed: Observed) -> None:
    assert URL not in launched(WORK, spec, observed).env


def test_how_it_is_stopped_is_known_from_its_start_on_and_the_file_has_the_last_word(spec: Spec) -> None:
    job = spec.overlays["job"]
    assert job.workload is not None
    asked = Stop("SIGUSR1", drain_s=0.0, grace_s=600.0)
    told = replace(spec, overlays={"job": replace(job, workload=replace(job.workload, stop=asked))})
    assert launched(WORK, told, running("chat")).stop == asked
    (ends,) = running("job", kind="workload").incarnations
    started = replace(ends, stop_settings=asked)
    assert stop_for(replace(spec, overlays={}), started.subject, started) == asked
    assert stop_for(spec, started.subject, started) == job.workload.stop
    assert stop_for(replace(spec, overlays={}), ends.subject, ends) == Stop()


def test_work_that_was_withdrawn_since_it_was_planned_is_not_started(spec: Spec) -> None:
    without_work = replace(spec.overlays["job"], workload=None)
    for withdrawn in (replace(spec, overlays={}), replace(spec, overlays={"job": without_work})):
        with pytest.raises(ActError, match="job has no workload any more"):
            launched(WORK, withdrawn, running("chat"))


def test_an_endpoint_is_started_in_the_version_it_was_planned_in_and_in_no_other(spec: Spec) -> None:
    baseline = spec.endpoints["chat"]
    own = replace(baseline, process_hash="own", command=("serve", "--long"))
    both = replace(spec, overlays={"job": replace(spec.overlays["job"], endpoints={"chat": own})})
    nobody = running("nobody")
    assert launched(replace(CHAT, process_hash="own"), both, nobody).argv == ("serve", "--long")
    assert launched(replace(CHAT, process_hash="own"), replace(both, endpoints={}), nobody).argv == ("serve", "--long")
    assert launched(replace(CHAT, process_hash=baseline.process_hash), both, nobody).argv == ("serve",)
    with pytest.raises(ActError, match="chat is no longer described as it was when its start was planned"):
        launched(replace(CHAT, process_hash="edited since"), both, nobody)

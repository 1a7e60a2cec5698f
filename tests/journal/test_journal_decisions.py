"""What went into a decision is kept with it, bounded, and without what nobody may read."""

from __future__ import annotations

import importlib.metadata
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from msgspec.structs import replace

import reconciler
from reconciler.clock import Instant, SystemClock
from reconciler.errors import StateError
from reconciler.journal import decisions
from reconciler.journal import journal as journal_module
from reconciler.journal.decisions import Inputs, Made, digest, maker, sources
from reconciler.journal.journal import UNKEPT, Journal
from reconciler.plan.actions import Event
from reconciler.plan.ledger import Ledger
from reconciler.plan.planner import plan

sys.path.insert(0, str(Path(__file__).parents[1] / "plan"))
from builders import NOW, endpoint, gpu, observed, overlay, spec

SECRET = "canary-7c1f"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "journal.sqlite", SystemClock()) as opened:
        yield opened


def made(now: Instant = NOW, ledger: Ledger | None = None) -> Made:
    coding = replace(endpoint("coding", gpus=1, port=8000), env={"API_TOKEN": SECRET})
    files = spec(coding, overlay("render", gpus=1))
    inputs = Inputs(files, observed(gpu(0), gpu(1)), ledger or Ledger(), now)
    return Made(inputs, plan(inputs.spec, inputs.observed, inputs.ledger, now))


def commit(journal: Journal, of: Made) -> None:
    journal.commit(of.plan.ledger, of.plan.events, of.inputs.now, of)
    journal.keep()


def test_a_decision_read_back_is_made_again_byte_for_byte_and_its_events_bear_its_number(journal: Journal) -> None:
    first = made()
    commit(journal, first)
    kept = journal.decision()
    assert kept is not None
    again = plan(kept.inputs.spec, kept.inputs.observed, kept.inputs.ledger, kept.inputs.now)
    assert again == first.plan
    assert digest(again) == kept.outcome == digest(first.plan)
    assert {event.data.get("decision") for event in journal.events()} == {kept.id}


def test_decisions_of_a_busy_moment_are_kept_together_once_there_are_enough_of_them(journal: Journal) -> None:
    def decide(turn: int) -> None:
        each = made(NOW.plus(float(turn)))
        journal.commit(each.plan.ledger, [Event("turn", "box", str(turn), "")], each.inputs.now, each)

    for turn in range(UNKEPT - 1):
        decide(turn)
        journal.keep(UNKEPT)
    assert journal.decision() is None, "nobody waits for them"
    decide(UNKEPT)
    assert journal.decision() is None, "no act waits for them either"
    journal.keep(UNKEPT)
    assert [journal.decision(n) is not None for n in (1, UNKEPT, UNKEPT + 1)] == [True, True, False]
    decide(UNKEPT + 1)
    journal.keep()
    assert journal.decision(UNKEPT + 1) is not None


def test_a_decision_that_changes_nothing_and_does_nothing_else_is_not_kept_again(journal: Journal) -> None:
    first = made()
    commit(journal, first)
    commit(journal, Made(replace(first.inputs, now=NOW.plus(10.0)), replace(first.plan, events=())))
    assert journal.decision(2) is None
    idle = replace(first.plan, events=(), actions=())
    commit(journal, Made(first.inputs, idle))  # nothing in the ledger moved, but what is done now is something else
    assert journal.decision(2) is not None


def test_a_writer_that_dies_before_it_kept_a_decision_loses_that_alone_and_its_number_is_not_used_again(
    journal: Journal, tmp_path: Path
) -> None:
    first = made()
    journal.commit(first.plan.ledger, first.plan.events, NOW, first)
    journal.close()
    with Journal.open(tmp_path / "journal.sqlite", SystemClock()) as again:
        assert again.ledger().overlays.keys() == first.plan.ledger.overlays.keys()
        assert again.decision() is None
        commit(again, Made(first.inputs, replace(first.plan, actions=())))
        assert [e.data["decision"] for e in again.events() if "decision" in e.data] == [1] * len(first.plan.events) + [
            2
        ] * len(first.plan.events)
        assert again.decision(2) is not None


def test_what_stands_in_environments_is_not_kept(journal: Journal) -> None:
    commit(journal, made())
    kept = journal.decision()
    assert kept is not None
    assert kept.inputs.spec.endpoints["coding"].env == {}
    assert SECRET not in repr(kept)


def test_the_oldest_decisions_and_the_specs_of_nobody_go(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "DECISIONS_KEPT", 3)
    monkeypatch.setattr(journal_module, "PRUNE_DECISIONS_EVERY", 4)
    for number in range(8):
        one = made(NOW.plus(float(number)))
        other = replace(one, inputs=replace(one.inputs, spec=replace(one.inputs.spec, digest=f"{number}")))
        commit(journal, other)
    with sqlite3.connect(journal.path) as raw:
        assert [n for (n,) in raw.execute("SELECT id FROM decisions")] == [6, 7, 8]
        assert raw.execute("SELECT count(*) FROM specs").fetchone() == (3,)


def test_a_decision_that_has_no_text_is_told_of_and_stops_nothing(journal: Journal) -> None:
    first = made()
    endless = replace(first.plan, objective={"victims": float("inf")})
    commit(journal, Made(first.inputs, endless))
    assert journal.ledger().overlays.keys() == first.plan.ledger.overlays.keys()
    assert [e.kind for e in journal.events(kind="decision.unkept")] == ["decision.unkept"]
    assert journal.decision() is None


def test_one_whose_values_look_otherwise_is_refused_with_the_version_that_made_it(journal: Journal) -> None:
    commit(journal, made())
    journal._connection.execute("UPDATE decisions SET version = '0.0.9', now = '{\"when\": 1}'")
    with pytest.raises(StateError, match="cannot be read") as refused:
        journal.decision()
    assert "0.0.9" in str(refused.value)


def test_a_spec_that_a_full_disk_kept_out_is_written_with_the_next_decision(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made()
    real = journal._insert_events

    def full(*_: object) -> None:
        raise StateError("disk full")

    monkeypatch.setattr(journal, "_insert_events", full)
    with pytest.raises(StateError):
        commit(journal, one)
    monkeypatch.setattr(journal, "_insert_events", real)
    commit(journal, one)
    assert journal.decision() is not None


def test_what_made_a_decision_is_another_planner_once_its_sources_are_and_by_whatever_else_the_same(
    tmp_path: Path,
) -> None:
    package = tmp_path / "package"
    shutil.copytree(Path(reconciler.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = sources(package)
    assert maker(made().plan).partition(" ")[0].endswith(f"+{before}")
    (package / "cli" / "main.py").write_text("")
    (package / "plan" / "notes.txt").write_text("")
    assert sources(package) == before
    told = {before}
    for name in ("plan/planner.py", "spec/values.py", "units.py", "journal/codec.py"):
        with (package / name).open("a") as file:
            file.write("# edited\n")
        told.add(sources(package))
    (package / "plan" / "planner.py").rename(package / "plan" / "planned.py")
    assert len(told | {sources(package)}) == 6


def test_who_is_run_from_sources_and_never_installed_keeps_decisions_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    decisions._own_version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", version)
    try:
        assert maker(made().plan) == f"unknown+{sources(Path(reconciler.__file__).parent)}"
    finally:
        decisions._own_version.cache_clear()

"""`plan` and `apply`, with a box that is told rather than looked at."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from desk import Desk
from msgspec.structs import replace

from reconciler.cli import converging, wiring
from reconciler.cli.main import run
from reconciler.clock import Instant, SystemClock
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir, acquire_writer
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Gpu, Observed
from reconciler.plan.planner import plan as decide
from reconciler.spec.load import load_setpoints
from reconciler.units import GIB

NOW = Instant(1795467600.0, 50_000.0)


class TiedBox:
    """A box of four free GPUs that nobody can touch; what `apply` was asked for is written down."""

    def __init__(self, setpoints: Path) -> None:
        self.setpoints = setpoints
        self.boot = "boot"
        self.ok = True
        self.asked: list[tuple[str, float | None]] = []

    def look(self, options, *, at=None):
        now = NOW if at is None else Instant(at, NOW.mono + at - NOW.wall)
        gpus = tuple(Gpu(i, f"GPU-{i}", "X", "ok", 80 * GIB, 0, (), "", True, now) for i in range(4))
        observed = Observed(now, self.boot, gpus, ())
        spec = load_setpoints(self.setpoints)
        return wiring.Look(spec, observed, Ledger(), decide(spec, observed, Ledger(), now), (), None)

    def converge(self, options, request, *, endpoints=(), timeout_s=None, progress):
        self.asked.append((request, timeout_s))
        seen = self.look(options)
        progress(seen.plan, seen.observed)
        message = "the box matches its set points" if self.ok else "stuck"
        return converging.Outcome(ok=self.ok, plan=seen.plan, observed=seen.observed, message=message)


@pytest.fixture
def box(desk, monkeypatch):
    made = TiedBox(desk.setpoints)
    monkeypatch.setattr(wiring, "look", made.look)
    monkeypatch.setattr(converging, "converge", made.converge)
    return made


def test_pending_changes_are_an_exit_code_only_on_request(box, capsys):
    assert run(["plan"]) == 0
    assert run(["plan", "--detailed-exitcode"]) == 2
    assert "+ big" in capsys.readouterr().out


def test_a_plan_in_json_has_every_key_that_scripts_rely_on(box, capsys):
    assert run(["plan", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert set(data) >= {
        "spec_hash", "observed_fingerprint", "now", "converged", "drift", "changes", "actions", "blocked", "budgets",
        "objective", "proof",
    }  # fmt: skip
    assert set(data["actions"][0]) == {
        "id", "needs", "op", "subject", "gpus", "reason", "cause", "timeout_seconds", "expected", "ready",
    }  # fmt: skip
    assert set(data["changes"][0]) == {"subject", "symbol", "actions", "reason", "cause", "expected_back"}


def test_at_moves_the_moment_of_the_decision_and_refuses_what_is_no_time(box, capsys):
    assert run(["plan", "--at", "2026-12-24T18:00:00+01:00", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["now"].startswith("2026-12-24T17:00:00")
    assert run(["plan", "--at", "teatime"]) == 64


def test_a_moment_after_a_window_that_nobody_would_have_missed_is_shown_with_the_next_one(box, desk):
    desk.write(
        "overlays/night.yaml",
        "version: 1\npriority: 900\nallow_baseline_eviction: true\ngpus: 4\n"
        'makespan: {schedule: "0 2 * * *", timezone: UTC, duration: 1h}\nworkload: {command: [sleep, "60"]}\n',
    )
    seen = box.look(None)
    files = load_setpoints(desk.setpoints)
    waiting = decide(files, seen.observed, Ledger(), NOW).ledger
    first = waiting.overlays["night"].window_start
    for days, hours, state in ((0, 0.1, "evicting"), (30, 5.0, "pending"), (30, 0.1, "evicting")):
        then = NOW.plus(first - NOW.wall + 86400 * days + 3600 * hours)
        record = wiring.decide_ahead(files, seen.observed, waiting, then).ledger.overlays["night"]
        assert record.state in (state, "starting")
        assert record.window_start == first + 86400 * (days if state == "evicting" else days + 1)


def test_a_saved_plan_names_its_grounds_and_is_carried_out_while_they_hold(box, tmp_path, capsys):
    saved = tmp_path / "night.plan"
    assert run(["plan", "--out", str(saved)]) == 0
    document = json.loads(saved.read_text())
    assert document["format_version"] == "1"
    assert document["spec_hash"] == document["data"]["spec_hash"]
    assert document["observed_fingerprint"] == document["data"]["observed_fingerprint"]
    assert [p.name for p in tmp_path.iterdir() if "night" in p.name] == ["night.plan"]
    assert run(["apply", str(saved), "--timeout", "5m"]) == 0
    assert box.asked == [("apply", 300.0)]


@pytest.mark.parametrize("mover", ["box", "spec"])
def test_a_stale_plan_exits_4_says_what_moved_and_does_nothing(box, desk, tmp_path, capsys, mover):
    saved = tmp_path / "old.plan"
    assert run(["plan", "--out", str(saved)]) == 0
    if mover == "box":
        box.boot = "another boot"
    else:
        desk.write("setpoints.yaml", desk.setpoints.read_text().replace("priority: 30", "priority: 31"))
    assert run(["apply", str(saved), "--yes"]) == 4
    assert box.asked == []
    assert ("the box" if mover == "box" else "the set points") in capsys.readouterr().err


def test_a_plan_for_another_time_is_not_carried_out_now(box, desk, tmp_path, capsys):
    desk.write(
        "overlays/night.yaml",
        "version: 1\npriority: 900\nallow_baseline_eviction: true\ngpus: 4\n"
        'makespan: {start: "2026-12-24T18:00:00+01:00", duration: 1h}\nworkload: {command: [sleep, "60"]}\n',
    )
    saved = tmp_path / "then.plan"
    assert run(["plan", "--at", "2026-12-24T18:10:00+01:00", "--out", str(saved)]) == 0
    assert run(["apply", str(saved), "--yes"]) == 4
    assert box.asked == []
    assert "what is to be done now" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format_version": "1"}', "version: 1\nendpoints: {}\n", "[" * 100_000, "\0", "1e999"]
)
def test_a_file_that_is_no_saved_plan_is_refused(box, tmp_path, text, capsys):
    path = tmp_path / "x"
    path.write_text(text)
    assert run(["apply", str(path)]) == 1
    assert box.asked == []
    assert str(path) in capsys.readouterr().err


def test_a_plan_that_cannot_be_saved_is_an_error_with_the_path(box, capsys):
    assert run(["plan", "--out", "/proc/nowhere/x.plan"]) == 1
    assert "/proc/nowhere/x.plan" in capsys.readouterr().err


def test_apply_proceeds_without_a_terminal_and_reports_on_stderr(box, capsys):
    assert run(["apply"]) == 0
    streams = capsys.readouterr()
    assert box.asked == [("apply", None)]
    assert streams.out == "the box matches its set points\n"
    assert "big: pending" in streams.err


def test_apply_that_cannot_be_done_exits_1_in_both_formats(box, capsys):
    box.ok = False
    assert run(["apply"]) == 1
    assert "stuck" in capsys.readouterr().err
    assert run(["apply", "--format", "json"]) == 1
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["ok"] is False
    assert data["message"] == "stuck"


@pytest.mark.parametrize(("answer", "code", "asked"), [(True, 0, 1), (False, 1, 0)])
def test_on_a_terminal_apply_shows_the_plan_and_asks(box, monkeypatch, capsys, answer, code, asked):
    questions = []
    monkeypatch.setattr("reconciler.cli.face.Face.asks", property(lambda _: True))
    monkeypatch.setattr("typer.confirm", lambda text, **_: questions.append(text) or answer)
    assert run(["apply"]) == code
    assert len(questions) == 1
    assert len(box.asked) == asked
    assert "+ big" in capsys.readouterr().out
    assert run(["apply", "--yes"]) == 0
    assert len(questions) == 1


def test_rejected_overlays_are_named_beside_the_plan(box, desk, capsys):
    desk.write("overlays/bad.yaml", "version: 1\nmakespan: {duration: 5}\n")
    assert run(["plan"]) == 0
    assert "bad.yaml:2:" in capsys.readouterr().err


def test_what_is_wrong_with_a_file_is_told_once(desk: Desk) -> None:
    desk.write("overlays/bad.yaml", "version: 1\nmakespan: {duration: 5}\n")
    for words in (["forecast", "--for", "1h"], ["explain", "bad"]):
        told = desk.run(*words).stderr
        assert told.count("bad.yaml:2:22: 5 has no unit") == 1, (words, told)


def test_a_plan_for_a_moment_that_has_passed_says_so(box, capsys):
    assert run(["plan", "--at", "2020-01-01T00:00:00Z"]) == 0
    assert "has passed; what was decided then is told by `reconciler explain --replay`" in capsys.readouterr().err
    assert run(["plan", "--at", "+1h"]) == 0
    assert capsys.readouterr().err == ""


def test_a_note_of_the_wiring_goes_to_stderr(box, monkeypatch, capsys):
    plain = box.look
    monkeypatch.setattr(wiring, "look", lambda *a, **k: replace(plain(*a, **k), notes=("mind the gap",)))
    assert run(["plan"]) == 0
    assert "mind the gap" in capsys.readouterr().err


def test_the_expected_times_are_those_that_were_measured_also_without_a_daemon(desk: Desk) -> None:
    def load_s() -> float:
        waits = [a for a in desk.data("plan")["actions"] if a["op"] == "wait_ready" and a["subject"] == "big"]
        begin, end = (datetime.fromisoformat(moment) for moment in waits[0]["expected"])
        return (end - begin).total_seconds()

    before = load_s()
    state = StateDir(desk.state)
    state.ensure()
    with acquire_writer(state):
        journal = Journal.open(state.journal, SystemClock())
        journal.record_timing("big", "load", 7.5)
        journal.close()
    assert before == pytest.approx(60.0, abs=0.01)
    assert load_s() == pytest.approx(7.5, abs=0.01)

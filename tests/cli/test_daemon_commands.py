"""What is asked of the box beyond the files, and who is asked first."""

from __future__ import annotations

import json
import os

import pytest

from reconciler.cli import converging
from reconciler.cli.main import run
from reconciler.journal.incarnations import list_ended, list_ids, new_id
from reconciler.journal.layout import StateDir, acquire_writer

PREVIEW = {
    "ours": [{"subject": "big", "pid": 7, "phase": "running", "strays": [8, 9], "gpus": [0, 1]}],
    "foreign": [{"gpu": 2, "pid": 99, "user": "someone", "command": "train.py", "memory_mib": 2048}],
}


@pytest.fixture
def asked(monkeypatch) -> list:
    calls: list = []

    def converge(options, request, **kwargs):
        calls.append((request, kwargs["endpoints"], kwargs["timeout_s"]))
        raise KeyboardInterrupt  # far enough: what comes after is another test's

    monkeypatch.setattr(converging, "converge", converge)
    monkeypatch.setattr(converging, "clean_start_preview", lambda options, names: PREVIEW)
    return calls


def test_down_beside_a_daemon_stops_nothing_and_names_the_daemon(desk, asked, capsys):
    state = StateDir(desk.state)
    state.ensure()
    with acquire_writer(state):
        assert run([*desk.words, "down"]) == 1
        assert run([*desk.words, "--format=json", "down", "big"]) == 1
    streams = capsys.readouterr()
    assert asked == []
    assert f"pid {os.getpid()}" in streams.err
    assert "bring the endpoints back" in streams.err
    assert json.loads(streams.out)["error"]["code"] == "DaemonRunning"


def test_a_second_daemon_is_refused_before_it_says_that_it_is_one(desk, capsys):
    state = StateDir(desk.state)
    state.ensure()
    with acquire_writer(state):
        assert run([*desk.words, "run"]) == 1
    said = capsys.readouterr()
    assert f"a daemon already runs on this state directory (pid {os.getpid()})" in said.err
    assert "set points" not in said.err + said.out


def test_down_without_a_daemon_passes_on_what_was_named(desk, asked):
    assert run([*desk.words, "down", "big", "small", "--timeout", "90s"]) == 130
    assert asked == [("down", ("big", "small"), 90.0)]


def test_what_a_power_cut_left_is_put_away_and_is_no_incident(desk):
    state = StateDir(desk.state)
    state.ensure()
    ids = sorted(new_id("0123456789ab") for _ in range(3))
    for name, records in zip(ids, [{"intent": "", "run": ""}, {"intent": '{"arg', "exit": ""}, {}], strict=True):
        (state.run / name).mkdir()
        for record, text in records.items():
            (state.run / name / f"{record}.json").write_text(text)
    done = desk.run("down", "--timeout", "30s")
    assert done.returncode == 0, done.stderr
    assert (list_ids(state), list(list_ended(state))) == ((), ids)
    assert desk.data("incidents")["incidents"] == []


def test_a_dry_clean_start_lists_ours_and_the_foreign_and_does_nothing(desk, asked, capsys):
    assert run([*desk.words, "clean-start", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "big: pid 7, and 2 more processes on GPU 0,1" in text
    assert "Foreign, left alone:" in text
    assert "pid 99 someone 2GiB train.py" in text
    assert run([*desk.words, "clean-start", "--dry-run", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == PREVIEW
    assert asked == []


@pytest.mark.parametrize("yes", [True, False])
def test_on_a_terminal_a_clean_start_asks_first(desk, asked, monkeypatch, capsys, yes):
    monkeypatch.setattr("reconciler.cli.face.Face.asks", property(lambda _: True))
    monkeypatch.setattr("typer.confirm", lambda *_, **__: yes)
    assert run([*desk.words, "clean-start", "big"]) == (130 if yes else 1)
    assert asked == ([("clean_start", ("big",), None)] if yes else [])


def test_reset_of_an_unknown_name_is_an_error_with_a_way_on(desk, capsys):
    assert run([*desk.words, "reset", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err
    assert run([*desk.words, "--format=json", "reset", "nobody"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "UnknownName"


def test_an_unknown_endpoint_is_refused_before_anything_is_stopped(desk):
    done = desk.run("down", "bgi")
    assert done.returncode == 1
    assert 'did you mean "big"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_introduces_itself_ends_on_ctrl_c_and_leaves_without_a_traceback(desk):
    desk.write("setpoints.yaml", desk.setpoints.read_text().replace("priority: high", "priority: high, state: standby"))
    desk.write("setpoints.yaml", desk.setpoints.read_text().replace("min_available: 1", "min_available: 0"))
    process = desk.popen("run")
    line = process.stderr.readline().decode()
    assert f"pid {process.pid}" in line
    assert str(desk.setpoints) in line
    assert str(desk.state) in line
    desk.wait(lambda: desk.answer("status").get("data", {}).get("daemon", {}).get("pid") == process.pid, "it answers")
    refused = desk.answer("reset", "bgi")["error"]
    assert refused["code"] == "UnknownName"
    assert refused["hint"] == 'did you mean "big"?'
    process.send_signal(2)
    assert process.wait(20) == 0
    assert b"Traceback" not in process.stderr.read()


def test_whoever_starts_things_as_root_is_told_whose_they_will_be(desk):
    desk.write("setpoints.yaml", "version: 1\nnode: {name: desk}\n")
    for words in (("apply", "--yes"), ("clean-start", "--yes")):
        said = desk.run(*words).stderr
        assert ("running as root: so does every endpoint" in said) is (os.geteuid() == 0)
    assert "running as root" not in desk.run("down").stderr
    assert "running as root" not in desk.run("plan").stderr

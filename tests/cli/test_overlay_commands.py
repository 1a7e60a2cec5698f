"""Overlays from the command line: what is written, what is refused, what `--wait` brings back."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from desk import Desk, interrupt
from hypothesis import given
from hypothesis import strategies as st

from reconciler.cli import overlay
from reconciler.cli.main import run
from reconciler.cli.submission import Job, choose_name, overlay_text
from reconciler.cli.values import Moment
from reconciler.spec.values import NAME


def submit(desk: Desk, *words: str) -> int:
    return run([*desk.words, "overlay", "submit", *words])


def written(desk: Desk) -> dict[str, dict]:
    return {p.name: yaml.safe_load(p.read_text()) for p in (desk.root / "overlays").iterdir()}


def test_a_submitted_command_becomes_a_file_that_says_what_was_asked(desk, capsys):
    words = ["--gpus", "2", "--for", "20m", "--priority", "high", "--evict", "--memory", "16GiB", "--requires", "chat"]
    assert submit(desk, *words, "--name", "render", "--", "luxcoreconsole", "--format", "json", "scene.cfg") == 0
    assert capsys.readouterr().out == "render\n"
    assert written(desk) == {
        "render.yaml": {
            "version": 1,
            "priority": "high",
            "allow_baseline_eviction": True,
            "makespan": {"duration": "20m"},
            "gpus": 2,
            "memory": "16GiB",
            "requires": ["chat"],
            "workload": {"command": ["luxcoreconsole", "--format", "json", "scene.cfg"], "cwd": str(Path.cwd())},
        }
    }
    assert run([*desk.words, "validate"]) == 0


def test_the_name_comes_from_the_command_and_two_submissions_have_two_names(desk, capsys):
    assert submit(desk, "--", "/usr/bin/Blender_4.2", "x") == 0
    assert submit(desk, "--", "/usr/bin/Blender_4.2", "x") == 0
    names = capsys.readouterr().out.split()
    assert len(set(names)) == 2
    assert all(name.startswith("blender-4-2-") for name in names)


@given(st.text(min_size=1))
def test_every_command_makes_an_acceptable_name(command):
    assert NAME.fullmatch(choose_name([command], {}))


def test_a_number_is_a_priority_and_a_default_is_left_to_the_format():
    assert yaml.safe_load(overlay_text(Job(("x",), "/", priority="600")))["priority"] == 600
    assert "priority" not in yaml.safe_load(overlay_text(Job(("x",), "/")))


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--gpus", "9", "--requires", "sight"], "sight"),
        (["--priority", "hihg"], "high"),
        (["--name", "Not A Name"], "name"),
    ],
)
def test_what_the_spec_would_reject_never_appears_in_the_folder(desk, capsys, words, word):
    assert submit(desk, *words, "--", "true") != 0
    assert written(desk) == {}
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../setpoints", "a/b", ".hidden", "Not A Name"])
def test_a_name_that_is_none_is_wrong_usage_and_no_path(desk, capsys, name):
    before = desk.setpoints.read_text()
    assert submit(desk, "--name", name, "--", "true") == 64
    assert "a name has at most 63" in capsys.readouterr().err
    assert written(desk) == {}
    assert desk.setpoints.read_text() == before


def test_a_name_that_is_taken_is_refused_and_its_file_is_left_alone(desk, capsys):
    assert submit(desk, "--name", "one", "--", "true") == 0
    before = written(desk)
    assert submit(desk, "--name", "one", "--", "false") == 64
    assert written(desk) == before


def test_without_a_daemon_the_submission_says_that_nothing_starts_yet(desk, capsys):
    assert submit(desk, "--format=json", "--", "true") == 0
    assert json.loads(capsys.readouterr().out)["data"]["daemon"] is False
    assert submit(desk, "--", "true") == 0
    assert "no daemon runs" in capsys.readouterr().err


def test_a_program_that_is_not_found_is_warned_of(desk, capsys):
    """Somebody may give way to it, and in vain."""
    assert submit(desk, "--", "nosuchprogram", "x") == 0
    assert "warning: no program 'nosuchprogram' is found from here" in capsys.readouterr().err
    assert submit(desk, "--", "true") == 0
    assert "warning" not in capsys.readouterr().err


def test_to_wait_without_a_daemon_is_refused_before_anything_is_written(desk, capsys):
    assert submit(desk, "--wait", "--", "true") == 1
    assert written(desk) == {}


def test_a_file_in_a_private_folder_is_private_and_readable_where_the_folder_is(desk):
    folder = desk.root / "overlays"
    for mode, expected in ((0o700, 0o600), (0o755, 0o644)):
        folder.chmod(mode)
        assert submit(desk, "--name", f"m{mode:o}", "--", "true") == 0
        assert (folder / f"m{mode:o}.yaml").stat().st_mode & 0o777 == expected


def test_cancel_removes_the_file_and_knows_what_was_nearly_meant(desk, capsys):
    assert submit(desk, "--name", "render-cards", "--", "true") == 0
    assert run([*desk.words, "overlay", "cancel", "render-card"]) == 1
    assert 'did you mean "render-cards"' in capsys.readouterr().err
    assert run([*desk.words, "overlay", "cancel", "render-cards"]) == 0
    assert written(desk) == {}


def test_cancel_does_not_leave_the_folder(desk):
    assert run([*desk.words, "overlay", "cancel", "../setpoints"]) == 1
    assert desk.setpoints.exists()


def test_list_shows_waiting_overlays_with_the_keys_of_status(desk):
    assert submit(desk, "--name", "one", "--", "true") == 0
    (listed,) = desk.data("overlay", "list")["overlays"]
    assert (listed["name"], listed["exit_code"]) == ("one", None)


def test_a_file_that_could_never_be_accepted_is_told_by_list_and_explain(desk, capsys):
    desk.write("overlays/odd.yaml", "version: 1\ngpu: 1\n")
    assert run([*desk.words, "overlay", "list"]) == 0
    assert f"cannot be accepted: {desk.root / 'overlays/odd.yaml'}; `reconciler validate` says why" in (
        capsys.readouterr().err
    )
    assert run([*desk.words, "explain", "odd"]) == 1
    assert 'odd.yaml:2:1: unknown key "gpu"' in capsys.readouterr().err
    assert run([*desk.words, "explain", "even"]) == 1
    assert "hint: known: big, chat, reasoning, small" in capsys.readouterr().err


JOB = """
import sys, time
for n in range(3):
    print("line", n, flush=True)
    time.sleep(0.1)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def busy_desk(desk):
    desk.write(
        "setpoints.yaml",
        "version: 1\nnode: {name: desk}\nendpoints:\n  idle: {model: m, port: 18613, state: stopped}\n",
    )
    desk.write("job.py", JOB)
    desk.start()
    return desk


def test_wait_streams_the_log_and_exits_with_the_code_of_the_job(busy_desk):
    command = [sys.executable, str(busy_desk.root / "job.py")]
    done = busy_desk.run("overlay", "submit", "--name", "three", "--wait", "--", *command, "3")
    assert done.returncode == 3
    assert done.stdout == "line 0\nline 1\nline 2\n"
    assert busy_desk.run("overlay", "submit", "--wait", "--", *command, "0").returncode == 0
    gone = busy_desk.run("overlay", "submit", "--name", "gone", "--wait", "--", "/nowhere/program")
    assert gone.returncode == 1
    assert "overlay gone is failed: its work cannot be started: /nowhere/program is not there" in gone.stderr
    assert busy_desk.run("logs", "three", "-n", "2").stdout == "line 1\nline 2\n"
    (log,) = (busy_desk.state / "logs").glob("workload-three.*.log")
    log.unlink()
    assert f"{log} is not there" in busy_desk.run("logs", "three").stderr


def test_ctrl_c_while_waiting_leaves_the_job_running_and_says_how_to_end_it(busy_desk):
    waiting = busy_desk.popen("overlay", "submit", "--name", "long", "--wait", "--", "sleep", "600")

    def job() -> dict | None:
        return next((o for o in busy_desk.data("status")["overlays"] if o["state"] == "active"), None)

    pid = busy_desk.wait(job, "the job runs")["pid"]
    assert any(line == b"overlay long is active\n" for line in waiting.stderr), "it waits for the end of the job"
    _, err = interrupt(waiting)
    assert waiting.returncode == 130, err
    assert "overlay cancel long" in err
    assert "Traceback" not in err
    os.kill(pid, 0)
    assert busy_desk.run("overlay", "cancel", "long").returncode == 0
    busy_desk.wait(lambda: not Path(f"/proc/{pid}").exists() or job() is None, "the job is ended")


def test_a_daemon_that_follows_other_files_is_noticed(busy_desk, tmp_path, monkeypatch, capsys):
    """An overlay written beside files that it does not follow would never begin."""
    there = busy_desk.setpoints
    place = ["--state-dir", str(busy_desk.state), "--simulate", "4x80GiB"]
    here = tmp_path / "elsewhere/setpoints/setpoints.yaml"
    here.parent.mkdir(parents=True)
    here.write_text(there.read_text())
    monkeypatch.chdir(here.parents[1])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RECONCILER_SETPOINTS", raising=False)
    follows = f"the daemon follows {there}"
    assert run([*place, "overlay", "submit", "--name", "lost", "--", "true"]) == 1
    assert run([*place, "overlay", "cancel", "lost"]) == 1
    assert capsys.readouterr().err.count(f"{follows}, and not {here}") == 2
    assert [path.name for path in here.parent.iterdir()] == [here.name]
    assert run([*place, "plan"]) == 0
    assert f"{follows}; this is what {here} would have it do" in capsys.readouterr().err
    here.unlink()  # none of one's own: those of the daemon are meant
    assert run([*place, "overlay", "submit", "--name", "found", "--wait", "--", "true"]) == 0
    assert run([*place, "plan"]) == 0
    assert follows not in capsys.readouterr().err
    assert run([*place, "overlay", "cancel", "found"]) == 0
    assert "found was over (done)" in capsys.readouterr().out


@pytest.mark.parametrize("wait", [["--wait"], []], ids=["waiting", "not waiting"])
def test_ctrl_c_while_it_is_looked_what_a_job_waits_for_says_how_to_end_it_as_well(desk, monkeypatch, capsys, wait):
    """Its file is there by then, and a daemon may have begun it."""

    def interrupted(*_):
        assert "long.yaml" in written(desk)
        raise KeyboardInterrupt

    monkeypatch.setattr(overlay, "_has_daemon", lambda _: True)
    monkeypatch.setattr(overlay, "_outlook", interrupted)
    assert submit(desk, "--name", "long", *wait, "--", "sleep", "600") == 130
    assert "`reconciler overlay cancel long` ends it" in capsys.readouterr().err
    assert "long.yaml" in written(desk)


@pytest.mark.parametrize("is_there", [True, False], ids=["its file is there", "nothing is written yet"])
def test_ctrl_c_at_the_very_moment_of_writing_says_how_to_end_what_may_begin(desk, monkeypatch, capsys, is_there):
    real = overlay.write_overlay

    def interrupted(*words):
        if is_there:
            real(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(overlay, "write_overlay", interrupted)
    assert submit(desk, "--name", "long", "--", "sleep", "600") == 130
    assert ("`reconciler overlay cancel long` ends it" in capsys.readouterr().err) is is_there
    assert ("long.yaml" in written(desk)) is is_there


def test_followers_see_what_happens_after_they_began(busy_desk):
    followers = [busy_desk.popen("--format", "json", "events", "-f", "-n", "0"), busy_desk.popen("logs", "first", "-f")]
    followers[1].wait(20)  # nothing was ever started for it
    assert followers[1].returncode == 1
    script = "import time; print('a', flush=True); time.sleep(600)"
    assert busy_desk.run("overlay", "submit", "--name", "first", "--", sys.executable, "-c", script).returncode == 0
    busy_desk.wait(lambda: busy_desk.run("logs", "first").stdout == "a\n", "the first line is in the log")
    log = busy_desk.popen("logs", "first", "-f", "-n", "1")
    assert log.stdout.readline() == b"a\n"
    kinds = set()
    while "active" not in kinds:
        event = json.loads(followers[0].stdout.readline())
        assert {"id", "time", "kind", "subject", "message", "cause", "data"} == set(event)
        kinds.add(event["kind"])
    unread = busy_desk.popen("logs", "first", "-f", "-n", "1")
    assert unread.stdout.readline() == b"a\n"
    unread.stdout.close()  # as `head -1` does; nothing more is written
    assert unread.wait(20) == 1
    assert unread.stderr.read() == b""
    for process in (followers[0], log):
        _, err = interrupt(process)
        assert process.returncode == 130
        assert err == ""


def test_a_job_for_later_is_written_with_its_start_and_hard_end_and_told_when_it_begins(desk, capsys):
    words = ["--start", "2031-03-01T22:00:00+01:00", "--deadline", "2031-03-02T06:00:00+01:00"]
    assert submit(desk, *words, "--name", "night", "--", "true") == 0
    makespan = written(desk)["night.yaml"]["makespan"]
    assert set(makespan) == {"start", "deadline"}, "without --for it takes until its deadline"
    assert [datetime.fromisoformat(makespan[key]).timestamp() for key in ("start", "deadline")] == [
        datetime.fromisoformat(word).timestamp() for word in (words[1], words[3])
    ]
    told = capsys.readouterr().err
    assert "night waits: NotYet" in told
    assert f"it begins at {datetime.fromisoformat(words[1]).astimezone():%Y-%m-%d %H:%M:%S}" in told
    assert run([*desk.words, "explain", "night"]) == 0
    told = capsys.readouterr().out
    assert f"it begins at {datetime.fromisoformat(words[1]).astimezone():%Y-%m-%d %H:%M:%S}" in told
    assert "Nothing further" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--start", "teatime"], "write it as 22:00 (the next one), +90m (from now)"),
        (["--start", "2020-01-01T00:00"], "has passed"),
        (["--deadline", "2020-01-01T00:00"], "has passed"),
        (["--start", "+2h", "--deadline", "+1h"], "the deadline is not after the start"),
    ],
)
def test_a_time_that_is_none_or_has_passed_is_refused(desk, capsys, words, said):
    assert submit(desk, *words, "--", "true") != 0
    assert said in capsys.readouterr().err
    assert written(desk) == {}


def test_an_hour_is_the_next_one_and_a_plus_counts_from_now():
    now = datetime.now().astimezone()
    in_a_minute, a_minute_ago = now + timedelta(minutes=1), now - timedelta(minutes=1)
    assert 0 < Moment.parse(f"{in_a_minute:%H:%M:%S}").wall - now.timestamp() <= 60
    assert 86000 < Moment.parse(f"{a_minute_ago:%H:%M:%S}").wall - now.timestamp() + 3600 < 90100, (
        "or an hour of DST off"
    )
    assert 5399 < Moment.parse("+90m").wall - now.timestamp() < 5500
    assert Moment.parse("2031-03-01T22:00:00+01:00").wall == 1930165200.0


def test_more_gpus_than_there_are_is_told_at_once(desk, capsys):
    assert submit(desk, "--gpus", "9", "--", "true") == 0
    assert "InsufficientGpus: it wants 9 GPUs, and 4 of this node may serve it" in capsys.readouterr().err


def test_what_waits_for_its_time_is_no_pending_change_and_what_is_due_and_blocked_is(desk):
    desk.write("setpoints.yaml", "version: 1\nendpoints:\n  idle: {model: m, port: 18614, state: stopped}\n")
    assert run([*desk.words, "plan", "--detailed-exitcode"]) == 0
    assert submit(desk, "--start", "+2h", "--name", "later", "--", "true") == 0
    assert run([*desk.words, "plan", "--detailed-exitcode"]) == 0
    assert submit(desk, "--gpus", "9", "--", "true") == 0
    assert run([*desk.words, "plan", "--detailed-exitcode"]) == 2

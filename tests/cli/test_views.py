"""What people and scripts see of a box that does not exist."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from desk import PROGRAM, Desk
from rich.console import Console

from reconciler.cli.main import run
from reconciler.cli.tables import bar, clock, gpu_list, local, memory, why


def test_status_in_json_has_the_parts_that_jq_is_pointed_at(desk: Desk):
    data = desk.data("status")
    assert [e["name"] for e in data["endpoints"]] == ["big", "small"]
    assert [e["state"] for e in data["endpoints"]] == ["pending", "stopped"]
    assert [g["index"] for g in data["gpus"]] == [0, 1, 2, 3]
    assert data["daemon"] == {"running": False, "pid": None, "since": None, "generation": None}
    assert data["overlays"] == []
    assert data["incidents"] == []
    assert {c["name"] for c in data["capabilities"]} == {"chat", "reasoning"}


def test_status_in_text_shows_names_states_and_a_bar_for_each_gpu(desk: Desk):
    text = desk.run("status").stdout
    assert re.search(r"big +pending +0,1", text)
    assert text.count("0B / 80GiB") == 4
    assert "no daemon" in text


def on_a_terminal(desk: Desk, *words: str, **environment: str) -> str:
    """What a terminal of 120 columns gets."""
    ours, theirs = pty.openpty()
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")}
    process = subprocess.Popen(
        [*PROGRAM, *desk.words, *words],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**variables, "TERM": "xterm-256color", "COLUMNS": "120", **environment},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    try:
        while block := os.read(ours, 65536):
            text += block
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(30) == 0, text
    return text.decode()


def test_colour_is_for_terminals_and_can_be_refused_in_two_ways(desk: Desk):
    coloured = re.compile(r"\x1b\[[\d;]*3\dm")
    assert coloured.search(on_a_terminal(desk, "status"))
    assert not coloured.search(on_a_terminal(desk, "status", "--no-color"))
    assert not coloured.search(on_a_terminal(desk, "status", NO_COLOR="1"))


def test_to_watch_needs_a_terminal(desk: Desk, capsys):
    assert run([*desk.words, "status", "--watch"]) == 64
    assert "events -f" in capsys.readouterr().err


def test_explain_tells_set_point_line_and_next_step_in_words(desk: Desk):
    text = desk.run("explain", "big").stdout
    assert text.startswith("big is pending")
    assert f"[{desk.setpoints}:6]" in text
    assert "priority 800" in text
    assert "now: start big" in text
    data = desk.data("explain", "big")
    assert data["kind"] == "endpoint"
    assert [step["op"] for step in data["next"]] == ["start", "wait_ready"]


def test_explain_knows_gpus_overlays_and_what_was_nearly_meant(desk: Desk):
    desk.write("overlays/render.yaml", "version: 1\nmakespan: {duration: 5m}\ngpus: 4\nworkload: {command: [x]}\n")
    assert "GPU 3" in desk.run("explain", "3").stdout
    assert desk.run("explain", "render").stdout.startswith("Overlay render is ")
    offered = desk.data("status")["capabilities"]
    for capability in offered:
        assert f"Capability {capability['name']} is offered by " in desk.run("explain", capability["name"]).stdout
    wrong = desk.run("explain", "rendr")
    assert wrong.returncode == 1
    assert 'did you mean "render"' in wrong.stderr


def test_history_of_a_box_without_one_is_empty_and_no_error(desk: Desk):
    assert desk.data("events") == {"events": []}
    assert desk.data("incidents", "--all") == {"incidents": []}
    wrong = desk.run("logs", "big")
    assert wrong.returncode == 1
    assert "nothing was" in wrong.stderr


def test_the_agenda_says_what_is_in_force(desk: Desk):
    (entry,) = desk.data("agenda")["agenda"]
    assert set(entry) == {"endpoint", "expected_states", "from", "until", "reason", "overlay", "in_force"}
    assert (entry["endpoint"], entry["in_force"]) == ("big", True)


@pytest.mark.parametrize("which", ["setpoints", "overlay"])
def test_a_schema_is_printed_as_it_is_in_both_formats(which, capsys):
    assert run(["schema", which]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["$schema"].startswith("https://json-schema.org/")
    assert run(["schema", which, "--format", "json"]) == 0
    assert capsys.readouterr().out == text


def test_the_simulated_node_can_be_looked_at_filled_broken_and_used(desk: Desk):
    assert len(desk.data("sim", "node")["gpus"]) == 4
    tenant = desk.popen("sim", "hold", "--gpu", "2", "--memory", "20GiB")
    try:
        assert re.match(rb"pid \d+ holds 20GiB on GPU 2\n", tenant.stdout.readline())
        report = desk.data("sim", "status")
        assert [g["used_bytes"] >> 30 for g in report["gpus"]] == [0, 0, 20, 0]
        (process,) = desk.data("status")["gpus"][2]["processes"]
        assert process["owner"] is None
        assert process["pid"] == report["gpus"][2]["holdings"][0]["pid"]
    finally:
        tenant.terminate()
        tenant.wait(10)
    assert desk.data("sim", "fault", "lost", "--gpu", "1")["gpus"][1]["faults"] == ["lost"]
    assert desk.data("status")["gpus"][1]["state"] != "ok"
    assert desk.data("sim", "fault", "mend")["gpus"][1]["faults"] == []
    (desk.state / "sim" / "faults.json").write_text("{")
    assert "faults.json: " in desk.run("sim", "status").stdout
    assert desk.answer("sim", "fault", "lost", "--gpu", "1")["error"]["hint"].endswith("`reconciler sim fault mend`")
    assert desk.data("sim", "fault", "mend")["faults_problem"] is None
    code = "import pynvml, sys; pynvml.nvmlInit(); sys.exit(pynvml.nvmlDeviceGetCount())"
    assert desk.run("sim", "exec", "--", sys.executable, "-c", code).returncode == 4


def test_what_this_program_wants_of_pydantic_is_not_asked_of_others_on_the_simulated_node(desk: Desk):
    code = "import os, sys; sys.exit(any(name.startswith('PYDANTIC_') for name in os.environ))"
    assert desk.run("sim", "exec", "--", sys.executable, "-c", code).returncode == 0


def test_what_the_user_wants_of_pydantic_is_handed_on_to_programs_on_the_simulated_node(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # which happens to be this program's own wish
    code = "import os, sys; sys.exit(os.environ['PYDANTIC_DISABLE_PLUGINS'] != '__all__')"
    assert desk.run("sim", "exec", "--", sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["fault", "lost"],
        ["fault", "lost", "--gpu", "9"],
        ["fault", "itch", "--gpu", "0"],
        ["hold", "--gpu", "9", "--memory", "1GiB"],
    ],
)
def test_a_fault_or_tenant_that_makes_no_sense_is_wrong_usage(desk: Desk, words):
    assert run([*desk.words, "sim", *words]) == 64


def test_small_words_of_the_tables():
    assert gpu_list([0, 1, 2, 3, 5, 7, 8]) == "0-3,5,7,8"
    assert gpu_list([]) == "-"
    assert memory(None) == "?"
    assert memory(2048) == "2GiB"
    assert clock(None) == "-"
    assert bar(None, 100).plain == "?" * 16
    assert bar(50, 100).plain.count("█") == 8
    assert bar(150, 100).plain.count("█") == 16
    assert why({"reason": "", "desired": "standby", "scheduled": None}) == "standby"
    planned = {"until": "2020-01-01T00:00:00Z", "reason": "gives way"}
    until = f"planned until {clock(planned['until'])}"
    assert why({"reason": "gives way", "desired": "running", "scheduled": planned}) == f"gives way; {until}"
    assert why({"reason": "it ends", "desired": "running", "scheduled": planned}) == f"it ends; {until}: gives way"
    assert why({"reason": "", "desired": "running", "scheduled": planned}) == f"{until}: gives way"


def test_a_name_that_looks_like_markup_is_shown_as_it_is():
    from reconciler.cli.tables import capabilities_table

    console = Console(width=100, markup=False)
    with console.capture() as shown:
        console.print(capabilities_table([{"name": "[red]x", "ready": 0, "min_available": 0, "endpoints": ["[b]"]}]))
    assert "[red]x" in shown.get()
    assert "[b]" in shown.get()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_column_is_squeezed_to_nothing_on_a_narrow_terminal(desk: Desk, width):
    from reconciler.cli.tables import status_view

    data = desk.data("status")
    data["gpus"][0]["processes"] = [
        {"pid": 4242, "owner": None, "user": "someone", "command": "python train.py --long", "memory_mib": 1}
    ]
    console = Console(width=width, markup=False)
    with console.capture() as shown:
        console.print(status_view(data))
    text = shown.get()
    assert "processes" in text
    assert "foreign" in text
    assert max(map(len, text.splitlines())) <= width


def test_what_is_wrong_with_the_files_is_told_in_one_block(desk: Desk):
    from reconciler.cli.tables import status_view

    data = desk.data("status")
    problem = {"file": "a.yaml", "line": 2, "column": 1, "message": "unknown key", "hint": "did you mean x?"}
    data["spec"] = {"in_force": "last good", "problems": [problem, {**problem, "line": 0, "hint": None}]}
    console = Console(width=100, markup=False)
    with console.capture() as shown:
        console.print(status_view(data))
    assert [line.strip() for line in shown.get().rstrip().splitlines()[-4:]] == [
        "a.yaml:2:1: unknown key",
        "hint: did you mean x?",
        "a.yaml: unknown key",
        "The last good version of these files, where there is one, stays in force.",
    ]


def test_moments_in_a_reason_are_in_local_time_as_those_in_the_columns_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as abroad:
        abroad.setenv("TZ", "Etc/GMT-2")
        time.tzset()
        said = local("kept for ask (which is to be back from 2026-11-27 23:06:23Z on)")
        assert clock("2020-01-01T00:00:00Z") == "2020-01-01 02:00:00"
    time.tzset()
    assert said == "kept for ask (which is to be back from 2026-11-28 01:06:23 on)"

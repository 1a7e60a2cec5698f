"""The program's manners: help, versions, errors, exit codes, streams."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from desk import PROGRAM, Desk

from reconciler.cli.main import COMMANDS, app, run

REPOSITORY = Path(__file__).parents[2]


def all_commands() -> dict[str, str]:
    """Every command with its help text, groups opened: `overlay submit`."""
    root = typer.main.get_command(app)
    found: dict[str, str] = {}
    context = typer.Context(root)
    for name in COMMANDS:
        command = root.get_command(context, name)
        found[name] = command.help or ""
        for inner, part in getattr(command, "commands", {}).items():
            found[f"{name} {inner}"] = part.help or ""
    return found


def test_help_imports_no_library_but_typer():
    code = (
        "import sys\nfrom reconciler.cli.main import run\nrun(['--help'])\n"
        "heavy = {'pydantic', 'rich', 'yaml', 'httpx', 'psutil', 'pynvml', 'watchfiles', 'sqlite3', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_begins_its_help_with_the_line_that_the_list_shows(name):
    assert all_commands()[name].splitlines()[0] == COMMANDS[name].summary


def test_every_command_documents_itself_with_an_example():
    groups = {"overlay", "sim"}
    example = re.compile(r"Examples?: reconciler")
    without = [name for name, text in all_commands().items() if name not in groups and not example.search(text)]
    assert without == []


def test_every_command_is_in_the_table_of_the_readme():
    rows = "\n".join(line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("|"))
    missing = [name for name in COMMANDS if not re.search(rf"`{re.escape(name)}\b", rows)]
    assert missing == []


def test_the_version_is_the_one_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"reconciler \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_without_a_word_the_help_is_shown(capsys):
    assert run([]) == 0
    assert "Usage: reconciler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["statsu"], "did you mean `reconciler status`"),
        (["status", "--wacth"], "--wacth"),
        (["--frobnicate"], "--frobnicate"),
        (["status", "--format", "yaml"], "yaml"),
        (["reset"], "NAME"),
        (["apply", "--timeout", "5 parsecs"], "30s, 5m, 2h"),
        (["apply", "--timeout", "0s"], "longer than zero"),
        (["sim", "hold", "--gpu", "0", "--memory", "20"], "GiB"),
        (["overlay"], "--help"),
        (["schema", "plan"], "plan"),
    ],
)
def test_wrong_usage_exits_64_says_what_is_wrong_and_leaves_stdout_alone(argv, word, capsys):
    assert run(argv) == 64
    streams = capsys.readouterr()
    assert word in streams.err
    assert streams.out == ""
    assert "Traceback" not in streams.err


def test_wrong_usage_is_told_as_json_to_those_who_asked_for_json(capsys):
    assert run(["status", "--wacth", "--format", "json"]) == 64
    answer = json.loads(capsys.readouterr().out)
    assert answer["format_version"] == "1"
    assert set(answer["error"]) == {"code", "message", "file", "line", "column", "hint"}
    assert answer["error"]["code"] == "UsageError"


def test_a_wrong_file_is_told_as_json_with_its_first_problem_and_all_of_them(desk: Desk):
    desk.write("setpoints.yaml", "version: 1\nendpoints:\n  a: {model: m, port: 1, gpu: 1}\n  b: {gpus: none}\n")
    done = desk.run("plan", "--format", "json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["error"]["file"] == str(desk.setpoints)
    assert answer["error"]["line"] == 3
    assert answer["error"]["code"] == "SpecError"
    assert len(answer["problems"]) >= 2
    assert {p["line"] for p in answer["problems"]} >= {3, 4}
    assert {*answer["error"]} - {"code"} == {*answer["problems"][0]}


def test_a_wrong_file_is_told_on_stderr_as_file_line_and_column(desk: Desk):
    desk.write("setpoints.yaml", "version: 1\nendpoints:\n  a: {model: m, port: 1, gpu: 1}\n")
    done = desk.run("plan")
    assert done.returncode == 1
    assert f"{desk.setpoints}:3:" in done.stderr
    assert "did you mean" in done.stderr
    assert done.stdout == ""


def test_shared_options_come_from_the_environment_as_well(desk: Desk):
    variables = {
        "RECONCILER_SETPOINTS": desk.setpoints,
        "RECONCILER_STATE_DIR": desk.state,
        "RECONCILER_SIMULATE": "2x24GiB",
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(
        [*PROGRAM, "status", "--format=json"], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    data = json.loads(done.stdout)["data"]
    assert [e["name"] for e in data["endpoints"]] == ["big", "small"]
    assert len(data["gpus"]) == 2


def test_a_reader_that_goes_away_is_met_without_a_word(desk: Desk):
    shell = " ".join([*PROGRAM, "schema", "setpoints", "|", "head", "-c", "10"])
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert len(done.stdout) == 10
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["status"], ["plan"], ["overlay", "list"], ["sim", "status"], ["agenda"]])
def test_no_escape_sequence_reaches_what_is_no_terminal(desk: Desk, words):
    done = desk.run(*words)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_choice_that_there_is_not_is_told_with_those_that_there_are(capsys):
    assert run(["--format", "yaml", "status"]) == 64
    assert "Invalid value for '--format': 'yaml' is not one of 'text', 'json'" in capsys.readouterr().err

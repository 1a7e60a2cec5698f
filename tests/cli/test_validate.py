from __future__ import annotations

import json

import pytest
from desk import Desk

from reconciler.cli.main import run
from reconciler.plan import solver

GOOD_OVERLAY = "version: 1\npriority: high\nmakespan: {duration: 5m}\ngpus: 1\nworkload: {command: [render]}\n"


def validate(desk: Desk, capsys, *words: str) -> tuple[int, dict]:
    code = run(["--setpoints", str(desk.setpoints), "--format", "json", "validate", *words])
    return code, json.loads(capsys.readouterr().out)["data"]


def test_good_files_are_counted_and_found_valid(desk, capsys):
    desk.write("overlays/render.yaml", GOOD_OVERLAY)
    code, data = validate(desk, capsys)
    assert code == 0
    assert data["valid"] is True
    assert data["problems"] == []
    assert [name.rsplit("/", 1)[1] for name in data["files"]] == ["setpoints.yaml", "render.yaml"]


def test_every_error_of_every_file_is_told_not_the_first_alone(desk, capsys):
    desk.write("setpoints.yaml", "version: 1\nendpoints:\n  a: {model: m, port: 70000}\n  b: {model: m, prot: 1}\n")
    desk.write("overlays/x.yaml", "version: 1\nmakespan: {duration: 5}\n")
    code, data = validate(desk, capsys)
    assert code == 1
    assert {p["file"].rsplit("/", 1)[1] for p in data["problems"]} == {"setpoints.yaml", "x.yaml"}
    assert {p["line"] for p in data["problems"] if p["file"].endswith("setpoints.yaml")} >= {3, 4}
    assert set(data["problems"][0]) == {"file", "line", "column", "message", "hint"}


def test_text_is_one_line_per_problem_with_its_place_and_a_hint(desk, capsys):
    desk.write("setpoints.yaml", "version: 1\nendpoints:\n  b: {model: m, port: 1, prioritty: 1}\n")
    assert run(["--setpoints", str(desk.setpoints), "validate"]) == 1
    streams = capsys.readouterr()
    assert streams.out.startswith(f"{desk.setpoints}:3:")
    assert "hint: did you mean" in streams.out
    assert "1 problem in 1 file" in streams.err


def test_an_overlay_is_checked_against_the_set_points_beside_it(desk, capsys):
    path = desk.write("overlays/render.yaml", GOOD_OVERLAY)
    assert run(["validate", str(path)]) == 0
    path = desk.write("overlays/render.yaml", GOOD_OVERLAY.replace("high", "hihg"))
    assert run(["validate", str(path)]) == 1
    assert 'did you mean "high"' in capsys.readouterr().out


def test_only_the_named_files_are_checked(desk, capsys):
    good = desk.write("overlays/good.yaml", GOOD_OVERLAY)
    desk.write("overlays/bad.yaml", "version: 1\n")
    code, data = validate(desk, capsys, str(good))
    assert (code, data["files"]) == (0, [str(good)])


@pytest.mark.parametrize(
    ("name", "content"),
    [("gone.yaml", None), ("binary.yaml", b"\xff\xfe\x00"), ("broken.yaml", b"a: [1,\n"), ("list.yaml", b"- 1\n")],
)
def test_a_file_that_cannot_be_read_is_a_problem_and_no_crash(desk, capsys, name, content):
    path = desk.root / "overlays" / name
    if content is not None:
        path.write_bytes(content)
    code, data = validate(desk, capsys, str(path))
    assert code == 1
    assert data["problems"][0]["file"] == str(path)


def test_a_secret_in_a_command_line_is_warned_of_at_its_place_and_refuses_nothing(desk, capsys):
    text = "version: 1\nendpoints:\n  a: {model: m, port: 1, args: [--api-key, hunter2]}\n"
    desk.write("setpoints.yaml", text)
    code, data = validate(desk, capsys)
    assert (code, data["valid"], data["problems"]) == (0, True, [])
    (warning,) = data["warnings"]
    assert (warning["line"], warning["column"]) == (3, 44)
    assert "env_file" in warning["hint"]
    assert run(["--setpoints", str(desk.setpoints), "validate"]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith(f"{desk.setpoints}:3:44: warning: what looks like a secret")
    assert "1 warning" in streams.err
    assert "hunter2" not in streams.out + str(data)


def test_a_file_that_no_daemon_would_read_is_not_valid(desk, capsys):
    path = desk.write("overlays/render.yaml", GOOD_OVERLAY)
    path.chmod(0o666)
    code, data = validate(desk, capsys, str(path))
    assert (code, data["problems"][0]["message"]) == (1, "can be written by everybody")


def test_what_may_be_moved_is_warned_of_where_nothing_can_tell_whom_to_move(desk, capsys, monkeypatch):
    desk.write("setpoints.yaml", "version: 1\nendpoints:\n  b: {model: m, port: 1, movable: true}\n")
    assert validate(desk, capsys)[1]["warnings"] == []
    for lacks in ("can_be_imported", "is_available"):
        monkeypatch.setattr(solver, lacks, lambda: False)
        code, data = validate(desk, capsys)
        assert code == 0
        (warning,) = data["warnings"]
        monkeypatch.undo()
    assert (warning["line"], warning["hint"]) == (3, "pip install 'reconciler[solver]', where reconciler is installed")

"""Files on disk: which are read, and which are not trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reconciler.errors import SpecError
from reconciler.spec.load import load_setpoints, read_texts

SETPOINTS = "version: 1\nendpoints:\n  a: {model: m, port: 1}\n"
JOB = "version: 1\nmakespan: {duration: 5m}\ngpus: 1\n"


@pytest.fixture
def box(tmp_path: Path) -> Path:
    (tmp_path / "setpoints.yaml").write_text(SETPOINTS)
    (tmp_path / "overlays").mkdir()
    return tmp_path


def test_overlays_are_the_yaml_files_of_the_folder_and_nothing_else(box: Path) -> None:
    names = [
        "a.yaml",
        "b.yml",
        ".c.yaml",
        "#d.yaml",
        "e.yaml~",
        "f.yaml.swp",
        "g.yaml.example",
        "h.json",
        "README.md",
        ".#i.yaml",
    ]
    for name in names:
        (box / "overlays" / name).write_text(JOB)
    assert list(load_setpoints(box / "setpoints.yaml").overlays) == ["a", "b"]


def test_a_missing_folder_is_not_an_empty_one(box: Path) -> None:
    assert read_texts(box / "setpoints.yaml").overlays == ()
    (box / "overlays").rmdir()
    assert read_texts(box / "setpoints.yaml").overlays is None
    assert load_setpoints(box / "setpoints.yaml").overlays == {}


def test_the_folder_is_the_one_that_the_set_points_name(box: Path) -> None:
    (box / "jobs").mkdir()
    (box / "jobs" / "a.yaml").write_text(JOB)
    (box / "setpoints.yaml").write_text(SETPOINTS + "overlays: jobs\n")
    assert list(load_setpoints(box / "setpoints.yaml").overlays) == ["a"]
    assert read_texts(box / "setpoints.yaml").overlays_folder == box / "jobs"


def test_a_file_that_everybody_can_write_is_not_read(box: Path) -> None:
    job = box / "overlays" / "a.yaml"
    job.write_text(JOB)
    job.chmod(0o666)
    spec = load_setpoints(box / "setpoints.yaml")
    assert (dict(spec.overlays), [p.message for p in spec.problems]) == ({}, ["can be written by everybody"])
    assert "chmod o-w" in (spec.problems[0].hint or "")
    (box / "setpoints.yaml").chmod(0o646)
    with pytest.raises(SpecError, match="can be written by everybody"):
        load_setpoints(box / "setpoints.yaml")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_read(box: Path) -> None:
    job = box / "overlays" / "a.yaml"
    job.write_text(JOB)
    os.chown(job, 12345, -1)
    spec = load_setpoints(box / "setpoints.yaml")
    assert [p.message for p in spec.problems] == ["belongs to another user (uid 12345)"]


def test_what_is_no_regular_file_is_told_and_never_waited_for(box: Path) -> None:
    os.mkfifo(box / "overlays" / "a.yaml")
    (box / "overlays" / "b.yaml").mkdir()
    (box / "overlays" / "c.yaml").symlink_to("/dev/zero")
    (box / "overlays" / "d.yaml").symlink_to(box / "nowhere")
    spec = load_setpoints(box / "setpoints.yaml")
    assert [p.message for p in spec.problems] == ["is not a regular file", "is a folder", "is not a regular file"]


def test_a_file_that_is_no_text_rejects_itself_alone(box: Path) -> None:
    (box / "overlays" / "a.yaml").write_bytes(b"version: \xff")
    (box / "overlays" / "b.yaml").write_text(JOB)
    spec = load_setpoints(box / "setpoints.yaml")
    assert list(spec.overlays) == ["b"]
    assert [(Path(p.file).name, p.line, p.column) for p in spec.problems] == [("a.yaml", 1, 10)]


def test_missing_set_points_are_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file") as caught:
        load_setpoints(tmp_path / "none.yaml")
    assert "--setpoints" in str(caught.value)


def test_broken_set_points_are_told_together_with_broken_overlays(box: Path) -> None:
    (box / "setpoints.yaml").write_text(SETPOINTS + "  b: {model: m, port: x}\n")
    (box / "overlays" / "a.yaml").write_text(JOB + "gpsu: 1\n")
    (box / "overlays" / "b.yaml").mkdir()
    with pytest.raises(SpecError) as caught:
        load_setpoints(box / "setpoints.yaml")
    assert [Path(p.file).name for p in caught.value.problems] == ["setpoints.yaml", "a.yaml", "b.yaml"]


def test_an_env_file_that_everybody_can_write_is_not_used(box: Path) -> None:
    (box / "s.env").write_text("A=1\n")
    (box / "setpoints.yaml").write_text("version: 1\nendpoints:\n  a: {model: m, port: 1, env_file: s.env}\n")
    assert load_setpoints(box / "setpoints.yaml").endpoints["a"].env_file == str(box / "s.env")
    (box / "s.env").chmod(0o666)
    with pytest.raises(SpecError, match=r"3:36: env_file .*s\.env: can be written by everybody"):
        load_setpoints(box / "setpoints.yaml")


def test_relative_paths_are_taken_from_the_folder_of_the_file(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(box)
    (box / "overlays" / "j.yaml").write_text(JOB + "workload: {command: [x], cwd: work}\n")
    spec = load_setpoints("setpoints.yaml")
    assert spec.endpoints["a"].cwd == str(box)
    workload = spec.overlays["j"].workload
    assert workload is not None
    assert workload.cwd == str(box / "overlays" / "work")
    assert spec.overlays["j"].source.file == "overlays/j.yaml"

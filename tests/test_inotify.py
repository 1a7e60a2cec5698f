"""What the kernel tells of folders: every edit, no reading, and nothing of a folder that has another name by now."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.inotify import EDITS, WRITES, Notes


@pytest.fixture
def notes() -> Iterator[Notes]:
    made = Notes(EDITS)
    yield made
    made.close()


def told(notes: Notes) -> frozenset[str]:
    """The kernel tells before the call that edits returns."""
    return notes.read() if select.select([notes], [], [], 0)[0] else frozenset()


def test_every_way_to_edit_a_file_is_told_by_its_name(notes: Notes, tmp_path: Path) -> None:
    file, draft = tmp_path / "setpoints.yaml", tmp_path / ".draft"
    assert notes.follow([tmp_path])
    file.write_text("a")
    assert told(notes) == {file.name}
    with file.open("a") as open_file:
        open_file.write("b")
        open_file.flush()
        assert told(notes) == frozenset(), "it is not finished"
    assert told(notes) == {file.name}
    draft.write_text("c")
    draft.rename(file)
    assert told(notes) == {file.name, draft.name}
    file.chmod(0o600)
    assert told(notes) == {file.name}
    file.unlink()
    assert told(notes) == {file.name}


def test_reading_is_not_told(notes: Notes, tmp_path: Path) -> None:
    (tmp_path / "setpoints.yaml").write_text("a")
    notes.follow([tmp_path])
    assert (tmp_path / "setpoints.yaml").read_text() == "a"
    assert list(tmp_path.iterdir())
    assert told(notes) == frozenset()


def test_who_asks_for_writes_is_told_of_files_that_stay_open(tmp_path: Path) -> None:
    notes = Notes(WRITES)
    with (tmp_path / "log").open("w") as log:
        notes.follow([tmp_path])
        log.write("line")
        log.flush()
        assert told(notes) == {"log"}
    notes.close()


def test_more_notes_than_one_call_reads_are_all_told(notes: Notes, tmp_path: Path) -> None:
    notes.follow([tmp_path])
    names = {f"{number:03}-{'x' * 200}" for number in range(200)}
    for name in names:
        (tmp_path / name).touch()
    assert told(notes) == names
    assert told(notes) == frozenset()


@pytest.mark.parametrize("end", ["removed", "moved"])
def test_a_folder_in_the_place_of_one_that_went_is_news(notes: Notes, tmp_path: Path, end: str) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    assert notes.follow([folder])
    assert not notes.follow([folder])
    if end == "removed":
        folder.rmdir()
    else:
        folder.rename(tmp_path / "before")
    assert "" in told(notes), "the folder as a whole"
    assert not notes.follow([folder])
    folder.mkdir()
    assert notes.follow([folder])
    (tmp_path / "before").mkdir(exist_ok=True)
    (tmp_path / "before" / "old.yaml").touch()
    (folder / "new.yaml").touch()
    assert told(notes) - {""} == {"new.yaml"}


def test_two_names_of_one_folder_are_let_go_of_one_by_one(notes: Notes, tmp_path: Path) -> None:
    folder, link = tmp_path / "overlays", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    assert notes.follow([folder, link])
    notes.follow([link])
    (folder / "one.yaml").touch()
    assert told(notes) == {"one.yaml"}
    notes.follow([])
    (folder / "two.yaml").touch()
    assert "two.yaml" not in told(notes)


def test_what_is_no_folder_is_not_followed(notes: Notes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not notes.follow([tmp_path / "file", tmp_path / "missing"])

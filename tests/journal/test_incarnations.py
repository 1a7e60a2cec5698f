"""The state directory and the records of incarnations in it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.errors import DaemonRunning, StateError
from reconciler.journal import incarnations
from reconciler.journal.archive import archive
from reconciler.journal.codec import encode
from reconciler.journal.incarnations import (
    Exit,
    Intent,
    Run,
    StopRecord,
    Unreadable,
    is_recorded,
    list_ended,
    list_ids,
    lock_path,
    log_path,
    new_id,
    read,
    remove_drafts,
    write_exit,
    write_intent,
    write_stop,
)
from reconciler.journal.layout import StateDir, acquire_writer, is_locked, take_lock, writer

NOW = Instant(1_700_000_000.25, 1234.5)


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o077)
    yield
    os.umask(old)


def intent(incarnation: str = "abc", **changes: object) -> Intent:
    made = Intent(
        id=incarnation, kind="endpoint", name="thinking", process_hash="hash", gpus=("GPU-0", "GPU-1"),
        memory_bytes=(1 << 30, 2 << 30), exclusive=False, port=8080, attempt=0, argv=("vllm", "serve", "ü"),
        log="/nowhere/log", started=NOW, boot_id="boot",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


RUN = Run(200, 5, "boot", 200, 199, 4, 1, NOW)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- the state directory


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
@pytest.mark.usefixtures("umask")
def test_all_folders_are_private_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    (tmp_path / "a").mkdir()
    state = StateDir(tmp_path / "a" / "state")
    os.umask(mask)
    state.ensure()
    state.ensure()
    for path in (state.path, state.locks, state.run, state.ended, state.logs, state.sim):
        assert mode(path) == 0o700


def test_paths_are_absolute_and_state_dirs_of_one_path_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert StateDir(Path("state")) == StateDir(tmp_path / "x" / ".." / "state")
    assert StateDir(Path("state")).journal == tmp_path / "state" / "journal.sqlite"


def test_an_empty_folder_made_by_hand_becomes_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    StateDir(tmp_path).ensure()
    assert mode(tmp_path) == 0o700


def test_a_folder_with_other_things_in_it_keeps_its_mode_but_others_must_not_write_there(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    StateDir(tmp_path).ensure()
    assert mode(tmp_path) == 0o755
    assert mode(tmp_path / "run") == 0o700
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    other.chmod(0o777)
    with pytest.raises(StateError, match="others may write") as caught:
        StateDir(other).ensure()
    assert caught.value.hint


def test_a_widened_folder_is_narrowed_again(state: StateDir) -> None:
    state.run.chmod(0o755)
    state.ensure()
    assert mode(state.run) == 0o700


@pytest.mark.parametrize("name", ["", "run"])
def test_a_link_or_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for kind, message in (("link", "symbolic link"), ("file", "not a directory")):
        state = StateDir(tmp_path / kind)
        place = state.path / name if name else state.path
        place.parent.mkdir(exist_ok=True)
        if kind == "link":
            place.symlink_to(elsewhere)
        else:
            place.touch()
        with pytest.raises(StateError, match=message) as caught:
            state.ensure()
        assert str(place) in caught.value.message
        assert caught.value.hint
        assert list(elsewhere.iterdir()) == []


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot be used"):
        StateDir(tmp_path / "file" / "state").ensure()


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDir(tmp_path / "state")
    state.ensure()
    monkeypatch.setattr("reconciler.journal.layout.os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StateError, match="belongs to uid"):
        state.ensure()


# ---------------------------------------------------------------- locks


def test_one_writer_at_a_time_and_everybody_may_ask_who(state: StateDir) -> None:
    assert writer(state) is None
    with acquire_writer(state):
        found = writer(state)
        assert found is not None
        assert found.pid == os.getpid()
        assert found.since is not None
        with pytest.raises(DaemonRunning) as caught:
            acquire_writer(state)
        assert caught.value.pid == os.getpid()
        assert str(os.getpid()) in caught.value.message
        assert mode(state.daemon_lock) == 0o600
    assert writer(state) is None
    acquire_writer(state).release()


def test_a_killed_writer_holds_nothing(state: StateDir) -> None:
    source = (
        "import sys, time\nfrom pathlib import Path\nfrom reconciler.journal.layout import StateDir, acquire_writer\n"
        "lock = acquire_writer(StateDir(Path(sys.argv[1])))\nprint('held', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen((sys.executable, "-c", source, str(state.path)), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    found = writer(state)
    assert found is not None
    assert found.pid == process.pid
    with pytest.raises(DaemonRunning):
        acquire_writer(state)
    process.kill()
    process.wait()
    assert writer(state) is None
    with acquire_writer(state):
        pass


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}', "[]", "\xff"])
def test_a_writer_that_has_not_said_who_it_is_is_a_writer_nevertheless(state: StateDir, text: str) -> None:
    with acquire_writer(state):
        state.daemon_lock.write_text(text, "latin-1")
        found = writer(state)
        assert found is not None
        assert found.pid is None


def test_asking_about_a_state_directory_that_is_not_there_creates_nothing(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    assert writer(state) is None
    assert list_ids(state) == ()
    assert list(tmp_path.iterdir()) == []


def test_testing_a_lock_neither_takes_nor_makes_it(state: StateDir) -> None:
    path = lock_path(state, "endpoint", "thinking")
    assert not is_locked(path)
    assert not path.exists()
    fd = take_lock(path)
    assert fd is not None
    assert is_locked(path)
    assert is_locked(path)
    assert take_lock(path) is None
    os.close(fd)
    assert not is_locked(path)


def test_subjects_never_share_a_lock_or_a_log(state: StateDir) -> None:
    names = ["a", "A", "a b", "a_20b", "a%20b", "a/b", "..", "ü", "x" * 300, "x" * 301, "x" * 150, "a.b", ""]
    paths = {lock_path(state, kind, name) for kind in ("endpoint", "workload") for name in names}
    assert len(paths) == 2 * len(names)
    for path in paths:
        assert path.parent == state.locks
        path.touch()
    assert log_path(state, "endpoint", "../../x", "id").parent == state.logs


# ---------------------------------------------------------------- records


def test_what_is_written_is_read_back(state: StateDir) -> None:
    path = write_intent(state, intent())
    assert path == state.run / "abc"
    asked = StopRecord(NOW, drained=False, signalled=None)
    write_stop(state, "abc", asked)
    write_exit(state, "abc", Exit(127, NOW, 'no "such" thing'))
    (path / "run.json").write_text(encode(RUN))
    records = read(path)
    assert records.intent == intent()
    assert (records.run, records.stop, records.exit) == (RUN, asked, Exit(127, NOW, 'no "such" thing'))
    assert records.unreadable == ()
    write_stop(state, "abc", StopRecord(NOW, drained=True, signalled=NOW.plus(5)))
    assert read(path).stop == StopRecord(NOW, drained=True, signalled=NOW.plus(5))
    assert sorted(entry.name for entry in path.iterdir()) == ["exit.json", "intent.json", "run.json", "stop.json"]


def test_records_but_the_stop_are_written_once(state: StateDir) -> None:
    write_intent(state, intent())
    with pytest.raises(FileExistsError):
        write_intent(state, intent(port=9999))
    write_exit(state, "abc", Exit(1, NOW))
    with pytest.raises(FileExistsError):
        write_exit(state, "abc", Exit(2, NOW))
    records = read(state.run / "abc")
    assert records.intent == intent()
    assert records.exit == Exit(1, NOW)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0, 0o777])
def test_records_are_private_whatever_the_umask(state: StateDir, mask: int) -> None:
    os.umask(mask)
    path = write_intent(state, intent())
    write_stop(state, "abc", StopRecord(NOW, drained=False, signalled=None))
    assert mode(path) == 0o700
    assert {mode(entry) for entry in path.iterdir()} == {0o600}


def test_a_crash_in_the_middle_of_an_intent_leaves_nothing_to_see(state: StateDir) -> None:
    (state.run / ".abc.new").mkdir()
    (state.run / ".abc.new" / "intent.json").write_text("{")
    assert list_ids(state) == ()


def test_drafts_that_crashes_left_can_be_cleared_away_and_nothing_else_is(state: StateDir) -> None:
    (state.run / ".older.new").mkdir()
    (state.run / ".older.new" / ".intent.json.tmp").write_text("{")
    write_intent(state, intent())
    remove_drafts(state)
    assert [p.name for p in state.run.iterdir()] == ["abc"]


def test_an_intent_that_is_too_large_to_be_read_again_is_not_recorded(state: StateDir) -> None:
    """What runs by it could be neither told nor stopped."""
    fits = replace(intent(), argv=("x" * 1_000_000,))
    assert read(write_intent(state, fits)).intent == fits
    with pytest.raises(OSError, match="more than a record may have"):
        write_intent(state, replace(intent("0" * 32), argv=("x" * (1 << 20),)))
    assert [folder.name for folder in state.run.iterdir()] == [fits.id]


def test_an_intent_that_cannot_be_recorded_leaves_no_draft(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(incarnations.os, "write", full)
    with pytest.raises(OSError, match="no space"):
        write_intent(state, intent())
    assert list(state.run.iterdir()) == []


@pytest.mark.parametrize(("name", "told"), [("run.json", True), ("exit.json", True), ("stop.json", False)])
def test_a_start_came_to_something_once_its_run_or_its_end_is_recorded(state: StateDir, name: str, told: bool) -> None:
    folder = write_intent(state, intent())
    assert not is_recorded(folder)
    (folder / name).write_text("torn {")
    assert is_recorded(folder) is told


def test_an_id_tells_of_which_boot_it_is_and_one_of_another_form_tells_nothing(state: StateDir) -> None:
    one, other = "b2f5aa3c-5d1e-4c0f-9d3b-1f0e5c7a9b10", "b2f5aa3c-5d1f-4c0f-9d3b-1f0e5c7a9b10"
    ids = {new_id(one) for _ in range(100)}
    assert len(ids) == 100
    assert {UUID(name).version for name in ids} == {8}
    for name in (*ids, uuid4().hex, "abc", f"{new_id(one)}0"):
        (state.run / name).mkdir()
        records = read(state.run / name)
        assert not records.of_another_boot(one)
        assert records.of_another_boot(other) == (name in ids)


def test_a_readable_intent_says_of_which_boot_it_is_whatever_its_id(state: StateDir) -> None:
    records = read(write_intent(state, intent(new_id("another"), boot_id="boot")))
    assert not records.of_another_boot("boot")
    assert records.of_another_boot("another")


@pytest.mark.parametrize(("kind", "synced"), [("endpoint", []), ("workload", ["intent.json", "folder", "run"])])
def test_what_is_recorded_before_a_start_reaches_the_disk_if_it_is_work(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, kind: str, synced: list[str]
) -> None:
    """Each before the name that it is found by is given: a power cut leaves all of it, or no trace."""
    names, sync = [], os.fsync

    def note(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        names.append({".intent.json.tmp": "intent.json", ".abc.new": "folder"}.get(name, name))
        assert (state.run / "abc").exists() == (name == "run")
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    write_intent(state, intent(kind=kind))
    assert names == synced


def test_nothing_recorded_is_absent(state: StateDir) -> None:
    records = read(state.run / "never")
    assert (records.intent, records.run, records.exit, records.stop) == (None, None, None, None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("intent.json", ""),
        ("intent.json", encode(intent("another"))),
        ("intent.json", encode(intent(memory_bytes=(1,)))),
        ("intent.json", encode(intent()).replace('"endpoint"', '"neither"')),
        ("run.json", encode(RUN)[:-9]),
        ("run.json", "[]"),
        ("run.json", "null"),
        ("run.json", '{"pid": 200}'),
        ("run.json", encode(RUN).replace('"pid":200', '"pid":true')),
        ("run.json", encode(RUN).replace('"pid":200', '"pid":200.5')),
        ("run.json", encode(replace(RUN, pid=-1))),
        ("run.json", encode(replace(RUN, pid=0))),
        ("run.json", encode(replace(RUN, session_id=1))),
        ("run.json", "[" * 100_000),
        ("exit.json", '{"exit_code": "0"}'),
        ("exit.json", "\x00" * 100),
        ("stop.json", '{"requested": null}'),
    ],
)
def test_what_is_torn_or_alien_is_unreadable_and_never_absent(state: StateDir, name: str, text: str) -> None:
    path = write_intent(state, intent())
    (path / name).write_text(text)
    part = getattr(read(path), name.removesuffix(".json"))
    assert isinstance(part, Unreadable), part
    assert str(path) in part.reason
    assert read(path).unreadable == (part.reason,)


@pytest.mark.parametrize("make", ["folder", "link", "fifo", "dangling link"])
def test_what_is_no_file_is_unreadable_and_hangs_nobody(state: StateDir, make: str) -> None:
    path = write_intent(state, intent())
    record = path / "exit.json"
    match make:
        case "folder":
            record.mkdir()
        case "link":
            (path / "other").write_text(encode(Exit(0, NOW)))
            record.symlink_to(path / "other")
        case "fifo":
            os.mkfifo(record)
        case _:
            record.symlink_to(path / "nowhere")
    assert isinstance(read(path).exit, Unreadable)


def test_a_record_of_another_user_is_unreadable(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_intent(state, intent())
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path / "intent.json", 12345, -1)
    else:
        monkeypatch.setattr("reconciler.journal.incarnations.os.geteuid", lambda: owner + 1)
    assert isinstance(read(path).intent, Unreadable)


def test_a_file_in_the_place_of_a_folder_of_records_is_unreadable(state: StateDir) -> None:
    (state.run / "abc").touch()
    assert len(read(state.run / "abc").unreadable) == 4


# ---------------------------------------------------------------- putting away


def test_the_last_of_each_subject_stay_and_older_ones_go_with_their_logs(state: StateDir) -> None:
    for number in range(5):
        for name in ("a", "b"):
            incarnation = f"{name}{number}"
            log = log_path(state, "endpoint", name, incarnation)
            log.touch()
            started = NOW.plus(10 - number if name == "b" else number)  # b: ids run against time
            write_intent(state, intent(incarnation, name=name, log=str(log), started=started))
    for incarnation in list_ids(state):
        archive(state, incarnation, keep=3)
        archive(state, incarnation, keep=3)
    assert list_ids(state) == ()
    assert list_ended(state) == ("a2", "a3", "a4", "b0", "b1", "b2")
    assert len(list(state.logs.iterdir())) == 6
    assert read(state.ended / "a4").intent is not None


def test_a_crash_while_one_is_forgotten_leaves_nothing_that_stays(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_path(state, "endpoint", "thinking", "abc")
    log.touch()
    write_intent(state, intent(log=str(log)))

    def killed(path: Path, **_: object) -> None:
        (path / "intent.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            archive(state, "abc", keep=0)
    assert not log.exists()
    assert list_ended(state) == ()
    write_intent(state, intent("def"))
    archive(state, "def", keep=1)
    assert [p.name for p in state.ended.iterdir()] == ["def"]


def test_putting_away_deletes_no_file_outside_the_logs(state: StateDir, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.touch()
    write_intent(state, intent(log=str(precious)))
    write_intent(state, intent("def", log=str(state.logs / ".." / ".." / "precious")))
    archive(state, "abc", keep=0)
    archive(state, "def", keep=0)
    assert list_ended(state) == ()
    assert precious.exists()


def test_where_nothing_can_be_put_away_to_records_stay_and_it_is_an_error(state: StateDir) -> None:
    write_intent(state, intent())
    state.ended.rmdir()
    with pytest.raises(FileNotFoundError):
        archive(state, "abc", keep=20)
    assert list_ids(state) == ("abc",)


@pytest.mark.parametrize("name", ["run", "ended"])
def test_nothing_is_put_away_through_a_link(state: StateDir, tmp_path: Path, name: str) -> None:
    write_intent(state, intent())
    (state.path / name).rename(tmp_path / "elsewhere")
    (state.path / name).symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").iterdir())
    with pytest.raises(NotADirectoryError, match="symbolic link"):
        archive(state, "abc", keep=20)
    assert sorted((tmp_path / "elsewhere").iterdir()) == before
    assert list_ended(state) == ()
    assert list_ids(state) == (("abc",) if name == "ended" else ())


def test_what_is_no_draft_does_not_keep_others_from_being_recorded(state: StateDir, tmp_path: Path) -> None:
    (state.run / ".x.new").write_text("not a folder")
    (state.run / ".y.new").symlink_to(tmp_path)
    write_intent(state, intent())
    assert list_ids(state) == ("abc",)
    assert tmp_path.is_dir()


def test_unreadable_records_can_be_put_away(state: StateDir) -> None:
    path = write_intent(state, intent())
    (path / "intent.json").write_text("{")
    archive(state, "abc", keep=20)
    assert list_ended(state) == ("abc",)


def test_unreadable_records_take_their_log_along(state: StateDir) -> None:
    logs = [log_path(state, "endpoint", "thinking", name) for name in ("first", "second")]
    for log, name in zip(logs, ("first", "second"), strict=True):
        log.touch()
        (write_intent(state, intent(name)) / "intent.json").write_text("{")
        archive(state, name, keep=1)
    assert [log.exists() for log in logs] == [False, True]


def test_unreadable_records_are_bounded_like_those_of_a_subject_and_others_stay(state: StateDir) -> None:
    write_intent(state, intent("sound"))
    archive(state, "sound", keep=1)
    for age, name in enumerate(("young", "middle", "old")):
        (write_intent(state, intent(name)) / "intent.json").write_text("{")
        os.utime(state.run / name, (1000 - age, 1000 - age))
    for name in ("middle", "old", "young"):
        archive(state, name, keep=1)
    assert len(list_ended(state)) == 2
    assert "sound" in list_ended(state)


def test_what_a_daemon_that_died_while_it_forgot_left_is_gone_after_the_next(state: StateDir) -> None:
    (state.ended / ".half").mkdir()
    (state.ended / ".half" / "run.json").touch()
    write_intent(state, intent())
    archive(state, "abc", keep=1)
    assert [p.name for p in state.ended.iterdir()] == ["abc"]


def test_the_records_are_plain_json_for_people(state: StateDir) -> None:
    path = write_intent(state, intent())
    found = json.loads((path / "intent.json").read_text())
    assert found["argv"] == ["vllm", "serve", "ü"]
    assert found["started"] == {"mono": NOW.mono, "wall": NOW.wall}

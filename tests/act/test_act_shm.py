"""What killed engines leave in /dev/shm: removed when it is proven to be theirs, and nobody has it; else left alone."""

from __future__ import annotations

import mmap
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import Argv, Nursery, program, until

from reconciler.act import shm
from reconciler.act.shm import born, left_behind, note, sweep
from reconciler.journal.archive import archive
from reconciler.journal.incarnations import SharedFile, read_shared

SHM = Path("/dev/shm")

PYTHON_SHARING = """
import os, signal, sys
from multiprocessing import resource_tracker, shared_memory
made = shared_memory.SharedMemory(name=sys.argv[1], create=True, size=1 << 20)
made.buf[:4] = b"left"
os.kill(resource_tracker._resource_tracker._pid, signal.SIGSTOP)  # else it may tidy up before it is killed, too
os.write(1, b"ready\\n")
while True: signal.pause()
"""


@pytest.fixture
def names() -> Iterator[list[str]]:
    made: list[str] = []
    yield made
    for name in made:
        (SHM / name).unlink(missing_ok=True)


def new(names: list[str], form: str = "psm_{}") -> str:
    names.append(form.format(secrets.token_hex(4)))
    return names[-1]


def mapping(name: str, *, keep_open: bool = False) -> Argv:
    """Maps a file of that name, made if it is not there, and closes its descriptor unless told otherwise."""
    return program(f"""
import mmap
fd = os.open("/dev/shm/{name}", os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, 4096)
held = {"fd" if keep_open else "mmap.mmap(fd, 4096)"}
{"" if keep_open else "os.close(fd)"}
say('ready')
while True: signal.pause()
""")


def stranger(name: str) -> Path:
    path = SHM / name
    path.write_bytes(b"mine" * 1024)
    path.chmod(0o600)
    return path


def end(nursery: Nursery, incarnation: str) -> None:
    """kill -9 of all of it, its resource tracker included, and its records put away."""
    nursery.run(nursery.actor().ensure_killed(incarnation))
    archive(nursery.state, incarnation, keep=20)


def swept(nursery: Nursery) -> dict[str, str | None]:
    return {left.file.name: left.why for left in sweep(nursery.state)}


def test_python_shared_memory_that_a_killed_process_left_is_removed_and_a_strangers_stays(
    nursery: Nursery, names: list[str]
) -> None:
    ours, theirs = new(names), stranger(new(names))
    incarnation = nursery.started((sys.executable, "-c", PYTHON_SHARING, ours))
    note(nursery.state, incarnation)
    end(nursery, incarnation)
    assert (SHM / ours).exists(), "it was not left, so there is nothing to show"
    assert [left.file.name for left in left_behind(nursery.state)] == [ours]
    assert swept(nursery) == {ours: None}
    assert not (SHM / ours).exists()
    assert theirs.exists()
    assert swept(nursery) == {}
    assert read_shared(nursery.state.ended / incarnation) == ()


@pytest.mark.parametrize("form", ["sem.mp-{}", "vllm_offload_{}.mmap", "psm_{}"])
def test_other_leaks_of_engines_are_told_by_mapping_and_by_descriptor(
    nursery: Nursery, names: list[str], form: str
) -> None:
    mapped, opened = new(names, form), new(names, form)
    for name, argv in ((mapped, mapping(mapped)), (opened, mapping(opened, keep_open=True))):
        incarnation = nursery.started(argv, name=f"e-{name[-8:]}".replace(".", "-"))
        note(nursery.state, incarnation)
        end(nursery, incarnation)
    assert swept(nursery) == {mapped: None, opened: None}
    assert not {mapped, opened} & {path.name for path in SHM.iterdir()}


def test_what_was_never_seen_in_its_hands_is_not_its_own(nursery: Nursery, names: list[str]) -> None:
    ours = new(names)
    incarnation = nursery.started(mapping(ours))
    end(nursery, incarnation)  # nobody looked while it lived
    assert swept(nursery) == {}
    assert (SHM / ours).exists()


def test_a_file_that_was_there_before_it_began_is_not_its_own(nursery: Nursery, names: list[str]) -> None:
    theirs = stranger(new(names))
    time.sleep(0.05)  # file systems' clocks tick every few milliseconds
    incarnation = nursery.started(mapping(theirs.name))
    note(nursery.state, incarnation)
    end(nursery, incarnation)
    assert swept(nursery) == {}
    assert theirs.exists()


def test_a_file_that_a_stranger_had_as_well_stays_also_when_the_stranger_is_gone(
    nursery: Nursery, names: list[str]
) -> None:
    shared = new(names)
    incarnation = nursery.started(mapping(shared))
    with (SHM / shared).open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        note(nursery.state, incarnation)
    note(nursery.state, incarnation)
    end(nursery, incarnation)
    assert swept(nursery) == {shared: "another process had it, too"}
    assert (SHM / shared).exists()


def test_a_name_that_people_may_mean_to_keep_stays(nursery: Nursery, names: list[str]) -> None:
    kept = new(names, "weights-{}.bin")
    incarnation = nursery.started(mapping(kept))
    note(nursery.state, incarnation)
    end(nursery, incarnation)
    assert swept(nursery) == {}
    assert (SHM / kept).exists()


def test_a_file_in_anybodys_hands_stays_until_they_let_go(nursery: Nursery, names: list[str]) -> None:
    ours = new(names)
    incarnation = nursery.started(mapping(ours))
    note(nursery.state, incarnation)
    for keep_open in (False, True):
        other = subprocess.Popen(mapping(ours, keep_open=keep_open), stdout=subprocess.PIPE)
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        if (nursery.state.run / incarnation).exists():
            end(nursery, incarnation)
        held = {ours: f"pid {other.pid} has it"}
        assert swept(nursery) == held
        assert {left.file.name: left.why for left in left_behind(nursery.state)} == held
        other.kill()
        other.communicate()
        if not keep_open:
            assert [left.why for left in left_behind(nursery.state)] == [None]
    assert swept(nursery) == {ours: None}
    assert not (SHM / ours).exists()


def test_a_name_given_to_another_file_meanwhile_stays(nursery: Nursery, names: list[str]) -> None:
    ours = new(names)
    incarnation = nursery.started(mapping(ours))
    note(nursery.state, incarnation)
    end(nursery, incarnation)
    (SHM / ours).unlink()
    stranger(ours)
    assert swept(nursery) == {}
    assert (SHM / ours).read_bytes()[:4] == b"mine"


def test_a_process_that_cannot_be_looked_into_has_it_by_the_kernels_word(
    nursery: Nursery, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = new(names)
    incarnation = nursery.started(mapping(ours))
    note(nursery.state, incarnation)
    end(nursery, incarnation)
    monkeypatch.setattr(shm, "_processes", list)  # as without root, or in a container
    with (SHM / ours).open("rb"):
        assert swept(nursery) == {ours: "a process that cannot be seen has it"}
    assert swept(nursery) == {ours: None}


def test_who_opens_a_file_while_it_is_removed_does_no_harm_to_the_remover(names: list[str]) -> None:
    """The kernel signals whoever holds a lease that is in somebody's way, by default with a signal that ends them."""
    code = (
        "import os, sys; from pathlib import Path; from reconciler.act import shm;"
        "path = Path(sys.argv[1]); info = path.stat();"
        "file = shm.SharedFile(path.name, info.st_dev, info.st_ino, None, info.st_uid, sole=True);"
        "real = Path.unlink;"
        "Path.unlink = lambda *a, **k: (print('held', flush=True), sys.stdin.readline(), real(*a, **k));"
        "print(shm._remove(file, path.parent))"
    )
    path = stranger(new(names))
    words = [sys.executable, "-c", code, str(path)]
    remover = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert remover.stdout is not None
    assert remover.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert remover.communicate("go on\n", timeout=30)[0] == "None\n"
    assert remover.returncode == 0
    assert not path.exists()


def test_the_dying_and_the_dead_do_not_disturb_a_look_at_all_of_proc(names: list[str]) -> None:
    path = stranger(new(names))
    info = path.stat()
    file = SharedFile(path.name, info.st_dev, info.st_ino, born(path), info.st_uid, sole=True)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    until(lambda: ") Z " in Path(f"/proc/{pid}/stat").read_text(), "a zombie")
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    with path.open("rb"):
        found = shm.holders({file.name: file}, [*pids, 4_000_000])
    os.waitpid(pid, 0)
    assert found == {file.name: {os.getpid()}}


def test_files_tell_when_they_were_created_whatever_is_done_to_their_times(names: list[str]) -> None:
    before = time.time()
    path = stranger(new(names))
    os.utime(path, (1, 1))
    told = born(path)
    assert told is not None
    assert before - 0.1 <= told <= time.time()
    assert born(SHM / "no-such-file") is None


def test_a_box_without_shared_memory_has_nothing_to_look_at(
    nursery: Nursery, obedient_process: str, tmp_path: Path
) -> None:
    note(nursery.state, obedient_process, shm=tmp_path / "nowhere")
    assert read_shared(nursery.state.run / obedient_process) == ()


def test_folders_links_and_files_with_a_second_name_are_nobodys_leftovers(tmp_path: Path) -> None:
    (tmp_path / "psm_00000001").mkdir()
    (tmp_path / "psm_00000002").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").touch()
    os.link(tmp_path / "victim", tmp_path / "psm_00000003")
    (tmp_path / "psm_00000004").touch()
    assert [name for name, _ in shm._candidates(tmp_path)] == ["psm_00000004"]


@pytest.mark.parametrize("record", ["intent.json", "run.json"])
def test_nothing_is_noted_of_one_whose_records_are_torn(nursery: Nursery, names: list[str], record: str) -> None:
    name = new(names)
    incarnation = nursery.started(mapping(name))
    torn = nursery.state.run / incarnation / record
    whole = torn.read_text()
    torn.write_text(whole[: len(whole) // 2])
    note(nursery.state, incarnation)
    assert read_shared(nursery.state.run / incarnation) == ()
    torn.write_text(whole)
    note(nursery.state, incarnation)
    assert [file.name for file in read_shared(nursery.state.run / incarnation)] == [name]


def of(path: Path) -> SharedFile:
    info = path.lstat()
    return SharedFile(path.name, info.st_dev, info.st_ino, born(path), info.st_uid, sole=True)


def test_what_became_another_file_a_folder_or_a_link_at_the_last_moment_stays(tmp_path: Path) -> None:
    """Between the look at its name and its removal; the file that is opened decides."""
    path, victim = tmp_path / "psm_00000001", tmp_path / "victim"
    path.touch()
    file = of(path)
    path.rename(victim)
    assert shm._remove(file, tmp_path) == "it cannot be opened: No such file or directory"
    path.symlink_to(victim)
    assert "cannot be opened" in (shm._remove(file, tmp_path) or "")
    path.unlink()
    path.touch()
    assert shm._remove(file, tmp_path) == "its name stands for another file now"
    assert path.exists()
    path.unlink()
    path.mkdir()
    assert "cannot be removed" in (shm._remove(of(path), tmp_path) or "")
    assert path.is_dir()
    assert victim.exists()


def test_who_has_a_file_of_that_name_elsewhere_does_not_have_it(names: list[str], tmp_path: Path) -> None:
    path = stranger(new(names))
    (left,) = [file for name, file in shm._candidates(SHM) if name == path.name]
    me = os.getpid()
    with (tmp_path / path.name).open("w"):
        assert shm.holders({path.name: left}, [me]) == {path.name: frozenset()}
        with path.open():
            assert shm.holders({path.name: left}, [me]) == {path.name: {me}}

"""Endpoints and jobs that run as another user: over daemons, to their last process, and what cannot be so."""

from __future__ import annotations

import io
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from box_driver import PROGRAM, Box, is_gone, wait_for

from reconciler.cli.main import run

pytestmark = pytest.mark.e2e
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
NOBODY = "nobody"
TREE_OF = f"of-nobody-{os.getpid()}"
"""Its processes are looked for on the whole box, where other tests run beside this one."""
TREE = 'echo "$$ $(id -un) $HOME ${TMPDIR-none} $(umask)" >> began; (trap "" TERM; setsid sleep 600) & sleep 600 & wait'


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder of that user's (pytest's own are private)."""
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, pwd.getpwnam(NOBODY).pw_uid, -1)
    yield folder
    shutil.rmtree(folder)


def lines(public: Path) -> list[list[str]]:
    began = public / "began"
    return [line.split() for line in began.read_text().splitlines()] if began.exists() else []


def processes_of(pid: int) -> set[int]:
    """Everything in the session of a leader, or that it started into another."""
    found = {pid}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if int(fields[3]) == pid or f"RECONCILER_SUBJECT={TREE_OF}\0".encode() in environment:
                found.add(int(entry.name))
    return {p for p in found if not is_gone(p)}


@needs_root
def test_a_tree_of_another_user_is_adopted_by_the_next_daemon_and_cleared_to_its_last_process(
    box: Box, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/of-root")
    account = pwd.getpwnam(NOBODY)
    box.spec["endpoints"][TREE_OF] = {
        "engine": "custom", "gpus": 0, "user": NOBODY, "cwd": str(public), "command": ["sh", "-c", TREE],
        "stop": {"drain": "0s", "grace": "500ms"},
    }  # fmt: skip
    box.write()
    box.start()
    wait_for(lambda: len(lines(public)) == 1, "it is started")
    pid = wait_for(lambda: box.pids()[TREE_OF], "it is seen")
    assert lines(public) == [[str(pid), NOBODY, account.pw_dir, "none", lines(public)[0][4]]]
    tree = wait_for(lambda: len(found := processes_of(pid)) >= 3 and found, "its whole tree is there")
    assert {Path(f"/proc/{p}").stat().st_uid for p in tree} == {account.pw_uid}

    box.kill()
    box.start()
    assert box.pids()[TREE_OF] == pid, "adopted, not started again"
    assert len(lines(public)) == 1

    box.kill()
    os.kill(pid, signal.SIGKILL)  # its children live on, while nobody watches
    wait_for(lambda: is_gone(pid), "its leader is gone")
    assert tree - {pid} <= processes_of(pid) | {pid}
    box.start()
    wait_for(lambda: len(lines(public)) == 2, "it is started afresh")
    assert not [p for p in tree if not is_gone(p)], "after the rest of the old one was ended"

    second = wait_for(lambda: box.pids()[TREE_OF], "it is seen")
    assert box.terminate() == 0
    assert box.run("down").returncode == 0
    assert not processes_of(second)


@needs_root
def test_a_job_runs_as_the_user_that_its_overlay_names(box: Box, public: Path) -> None:
    box.write()
    box.start()
    work = {"command": ["sh", "-c", "id -un > who; cat secrets 2> refused; true"], "cwd": str(public), "user": NOBODY}
    secret = public / "secrets"
    secret.write_text("root's")
    secret.chmod(0o600)
    box.overlay("job", gpus=0, workload=work)
    box.wait_overlay("job", "done")
    assert (public / "who").read_text() == f"{NOBODY}\n"
    assert "denied" in (public / "refused").read_text()


@needs_root
def test_files_of_the_user_that_is_run_as_decide_nothing(box: Box, public: Path) -> None:
    """He runs what root says, and does not say what root runs."""
    box.write()
    uid = pwd.getpwnam(NOBODY).pw_uid
    path = box.overlay("job", gpus=0, workload={"command": ["true"], "user": NOBODY})
    os.chown(path, uid, -1)
    (problem,) = box.json("validate")["data"]["problems"]
    assert problem["message"] == f"belongs to another user (uid {uid})"
    os.chown(path, 0, -1)
    os.chown(box.overlays, uid, -1)
    (problem,) = box.json("validate")["data"]["problems"]
    assert f"belongs to another user (uid {uid})" in problem["message"]


def test_a_user_that_does_not_exist_is_an_error_at_its_place(box: Box) -> None:
    box.spec["endpoints"]["other"] = {"engine": "custom", "gpus": 0, "command": ["true"], "user": "no-such-user"}
    box.write()
    answer = box.json("validate")["data"]
    (problem,) = answer["problems"]
    assert problem["message"] == 'there is no user "no-such-user" on this box'
    line = box.setpoints.read_text().splitlines()[problem["line"] - 1]
    assert line[problem["column"] - 1 :] == "no-such-user"
    assert problem["hint"]


def test_another_user_where_the_daemon_is_not_roots_is_an_error_that_says_so() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # pytest's own are root's alone
    try:
        box = Box(folder)
        box.spec["endpoints"]["other"] = {"engine": "custom", "gpus": 0, "command": ["true"], "user": "daemon"}
        box.write()
        code, said = validated_by_nobody(box)
    finally:
        shutil.rmtree(folder)
    assert code == 1
    assert 'only root may run things as another user, here "daemon"' in said
    assert "run reconciler as root, or leave `user` out" in said


def validated_by_nobody(box: Box) -> tuple[int, str]:
    """Exit code and stdout of `validate`, by a plain user: this one, or else `nobody`."""
    words = box.argv("validate")[len(PROGRAM) :]
    with redirect_stdout(io.StringIO()):
        run(words)  # loads what a plain user may not be able to load from root's own installation
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(tell, 1)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(pwd.getpwnam(NOBODY).pw_gid)
                os.setuid(pwd.getpwnam(NOBODY).pw_uid)
            with open(1, "w", closefd=False) as out, redirect_stdout(out):
                code = run(words)
            os._exit(code)
        finally:
            os._exit(99)
    os.close(tell)
    with os.fdopen(told) as answer:
        said = answer.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

"""Leaders that run as another user: really so, and still ours to watch and to end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from nursery import BRIEF, Nursery, is_running, until

from reconciler.act.account import find_account
from reconciler.act.environment import child_environment
from reconciler.errors import ActError

NOBODY = "nobody"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@needs_root
def test_every_right_of_the_daemons_user_is_gone_before_the_program_begins(nursery: Nursery) -> None:
    account = find_account(NOBODY)
    launch = nursery.launch(("/bin/sh", "-c", "echo ready; exec sleep 600"), account=account)
    nursery.run(nursery.actor().ensure_started(launch))
    until(lambda: "ready" in nursery.log(launch), "the program to be ready")
    status = status_of(nursery.run_record(launch.incarnation).pid)
    assert status["Uid"].split() == [str(account.uid)] * 4
    assert status["Gid"].split() == [str(account.gid)] * 4
    assert sorted(map(int, status["Groups"].split())) == sorted(account.groups)
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    log = next(nursery.state.logs.iterdir()).stat()
    assert (log.st_uid, log.st_mode & 0o777) == (os.geteuid(), 0o600)


@needs_root
def test_a_tree_of_another_user_is_adopted_and_ends_to_its_last_member(nursery: Nursery) -> None:
    script = "trap '' TERM; setsid sleep 600 & sleep 600 & echo ready; wait; wait"
    launch = nursery.launch(("/bin/sh", "-c", script), account=find_account(NOBODY))
    nursery.run(nursery.actor().ensure_started(launch))
    until(lambda: len(nursery.members(launch.incarnation)) == 3, "the whole tree to be seen as ours")
    before = nursery.members(launch.incarnation)
    nursery.run(nursery.actor().ensure_stopped(launch.incarnation, BRIEF))  # a new actor: the next daemon's
    assert nursery.exit_code(launch.incarnation) == -9
    assert not [pid for pid in before if is_running(pid)]


@needs_root
def test_a_folder_beyond_that_users_reach_is_why_it_could_not_start(nursery: Nursery, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    launch = nursery.launch(("/bin/true",), account=find_account(NOBODY), cwd=str(private))
    nursery.run(nursery.actor().ensure_started(launch))
    assert nursery.exit_code(launch.incarnation) == 126
    assert "Permission denied" in (nursery.records(launch.incarnation).exit.error or "")


def test_the_environment_is_that_users_and_the_set_points_have_the_last_word() -> None:
    account = find_account(NOBODY)
    parent = {"HOME": "/root", "USER": "root", "PATH": "/bin", "XDG_RUNTIME_DIR": "/run/user/0", "TMPDIR": "/root/tmp"}
    child = child_environment(parent, account=account, env={"HOME": "/data"})
    assert child == {
        "HOME": "/data", "USER": NOBODY, "LOGNAME": NOBODY, "SHELL": account.shell, "PATH": "/bin",
    }  # fmt: skip


def test_a_user_that_went_away_is_an_error() -> None:
    with pytest.raises(ActError, match="no-such-user"):
        find_account("no-such-user")

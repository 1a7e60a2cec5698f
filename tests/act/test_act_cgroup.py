"""Control groups: whoever is in one is found and ended, whatever else was lost; and nobody else ever is.

With real groups, hence skipped where none can be made; what must hold without them is in the other files.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from nursery import BRIEF, IGNORING_SIGTERM, OBEDIENT, PATIENT, Nursery, is_running, program, until

from reconciler import cgroup
from reconciler.act import shim
from reconciler.act.account import find_account
from reconciler.clock import SystemClock
from reconciler.identity import read_marker
from reconciler.journal.archive import archive
from reconciler.journal.incarnations import Intent, write_intent
from reconciler.observe.process import ProcessReader

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")

ESCAPING = program("""
if os.fork() == 0:
    os.setsid()
    pid = os.fork()
    if pid == 0:
        os.closerange(0, 1024)
        os.execve(sys.executable, [sys.executable, '-I', '-S', '-c',
            'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: signal.pause()'], {})
    say(f'escaped {pid}')
    os._exit(0)
os.wait()
say('ready')
signal.pause()
""")
"""Leaves behind a process of another parent and session, without the marker and with nothing open."""


@pytest.fixture
def groups_in(control_groups: str) -> str:
    return control_groups


@pytest.fixture
def escaped(nursery: Nursery) -> Iterator[tuple[str, int]]:
    """An incarnation, and a process of it that nothing leads to once shim and leader are killed, as they are here."""
    incarnation, pid = start_escaping(nursery)
    kill_shim(nursery, incarnation)
    os.kill(nursery.run_record(incarnation).pid, signal.SIGKILL)
    until(lambda: not is_running(nursery.run_record(incarnation).pid))
    assert is_running(pid)
    yield incarnation, pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_shim(nursery: Nursery, incarnation: str) -> None:
    shim = nursery.run_record(incarnation).shim_pid
    os.kill(shim, signal.SIGKILL)
    until(lambda: not is_running(shim))


def start_escaping(nursery: Nursery) -> tuple[str, int]:
    incarnation = nursery.started(ESCAPING)
    words = nursery.log(incarnation).split()
    pid = int(words[words.index("escaped") + 1])
    until(lambda: not Path(f"/proc/{pid}/environ").read_bytes() and read_marker(pid, "PATH") is None)
    return incarnation, pid


def who_is_in(group: str | None) -> set[int]:
    """Read without the code under test."""
    assert group is not None
    return {int(line) for line in Path(group, "cgroup.procs").read_text().split()}


def test_leader_and_children_are_in_a_group_of_their_own_and_their_shim_is_not(
    nursery: Nursery, tree_with_setsid_grandchild: str
) -> None:
    group = nursery.group(tree_with_setsid_grandchild)
    assert who_is_in(group) == nursery.members(tree_with_setsid_grandchild)
    assert len(who_is_in(group)) == 3
    assert os.getpid() not in who_is_in(group)
    assert nursery.run_record(tree_with_setsid_grandchild).shim_pid not in who_is_in(group)


def test_who_escaped_and_lost_shim_and_leader_is_found_and_ended(nursery: Nursery, escaped: tuple[str, int]) -> None:
    incarnation, pid = escaped
    assert nursery.members(incarnation) == {pid}
    nursery.run(nursery.actor().ensure_stopped(incarnation, PATIENT))
    assert not is_running(pid)


def test_the_next_daemon_sees_who_escaped_as_a_stray_of_its_owner_until_it_is_gone(
    nursery: Nursery, escaped: tuple[str, int]
) -> None:
    incarnation, pid = escaped
    reader = ProcessReader(nursery.state, SystemClock())
    (seen,) = reader.read()
    assert (seen.strays, seen.alive) == ((pid,), True)
    assert reader.owner_of(pid) == seen.subject, "what it holds on a GPU is no stranger's"
    nursery.run(nursery.actor().ensure_killed(incarnation))
    (seen,) = reader.read()
    assert (seen.strays, seen.alive) == ((), False)


def test_archiving_takes_the_group_away_and_waits_for_who_is_still_in_it(
    nursery: Nursery, escaped: tuple[str, int]
) -> None:
    incarnation, _ = escaped
    group = nursery.group(incarnation)
    assert group is not None
    archive(nursery.state, incarnation, keep=20)
    assert (nursery.state.run / incarnation).exists(), "somebody lives in its group"
    nursery.run(nursery.actor().ensure_killed(incarnation))
    archive(nursery.state, incarnation, keep=20)
    assert not (nursery.state.run / incarnation).exists()
    assert not Path(group).exists()


def test_members_of_groups_below_are_members_and_their_groups_go_too(nursery: Nursery) -> None:
    incarnation = nursery.started(
        program("""
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say('ready')
    while True: signal.pause()
signal.pause()
""")
    )
    group = nursery.group(incarnation)
    assert group is not None
    below = Path(group, "made-by-itself")
    below.mkdir()
    (child,) = nursery.members(incarnation) - {nursery.run_record(incarnation).pid}
    (below / "cgroup.procs").write_text(str(child))
    kill_shim(nursery, incarnation)
    assert child in nursery.members(incarnation)
    nursery.run(nursery.actor().ensure_stopped(incarnation, PATIENT))
    assert not is_running(child)
    archive(nursery.state, incarnation, keep=20)
    assert not Path(group).exists()


def test_who_was_put_into_a_group_from_outside_ends_with_it_also_after_its_tree_is_over(
    nursery: Nursery, obedient_process: str
) -> None:
    guest = subprocess.Popen(("sleep", "600"))
    try:
        group = nursery.group(obedient_process)
        assert group is not None
        Path(group, "cgroup.procs").write_text(str(guest.pid))
        run = nursery.run_record(obedient_process)
        os.kill(run.pid, signal.SIGTERM)
        until(lambda: not is_running(run.shim_pid), "the shim to see its tree over")
        reader = ProcessReader(nursery.state, SystemClock())
        (seen,) = reader.read()
        assert seen.strays == (guest.pid,)
        nursery.run(nursery.actor().ensure_stopped(obedient_process, PATIENT))
        assert guest.wait(10) == -signal.SIGKILL
        (seen,) = reader.read()
        assert not seen.alive
    finally:
        guest.kill()
        guest.wait()


def test_a_frozen_group_ends_all_the_same(nursery: Nursery) -> None:
    incarnation = nursery.started(IGNORING_SIGTERM)
    group = nursery.group(incarnation)
    assert group is not None
    Path(group, "cgroup.freeze").write_text("1")
    nursery.run(nursery.actor().ensure_stopped(incarnation, BRIEF))
    assert nursery.exit_code(incarnation) == -signal.SIGKILL


@pytest.mark.parametrize("able", [True, False], ids=["in one call", "one by one, as before Linux 5.14"])
def test_a_tree_that_forks_without_end_is_outrun_without_its_shim(
    nursery: Nursery, tree_forking_without_end: str, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not able:
        monkeypatch.setattr(cgroup, "kill", lambda *_: frozenset())
    kill_shim(nursery, tree_forking_without_end)
    nursery.run(nursery.actor().ensure_killed(tree_forking_without_end))
    assert not who_is_in(nursery.group(tree_forking_without_end))


def test_who_escaped_is_ended_on_kernels_that_cannot_kill_a_group(
    nursery: Nursery, escaped: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "kill", lambda *_: frozenset())
    nursery.run(nursery.actor().ensure_killed(escaped[0]))
    assert not is_running(escaped[1])


def test_one_that_cannot_join_a_group_runs_without_and_says_so(nursery: Nursery, tmp_path: Path) -> None:
    nursery.groups_in = str(tmp_path / "no" / "such" / "place")
    incarnation = nursery.started(OBEDIENT)
    assert "it has no control group of its own: [Errno 2] No such file or directory" in nursery.log(incarnation)
    assert nursery.members(incarnation) == {nursery.run_record(incarnation).pid}
    nursery.run(nursery.actor().ensure_stopped(incarnation, PATIENT))
    assert nursery.exit_code(incarnation) == -signal.SIGTERM
    archive(nursery.state, incarnation, keep=20)
    assert not (nursery.state.run / incarnation).exists()
    nursery.groups_in = None


def test_a_group_made_for_a_start_that_never_came_goes_with_its_record(nursery: Nursery, control_groups: str) -> None:
    """The daemon was killed between the group and the shim."""
    intent = intend(nursery, lambda incarnation: cgroup.path_in(control_groups, incarnation))
    assert intent.group is not None
    Path(intent.group).mkdir()
    archive(nursery.state, intent.id, keep=20)
    assert not Path(intent.group).exists()
    assert (nursery.state.ended / intent.id).exists()


# ---------------------------------------------------------------- who may

MOVING_OUT = program("""
with open(sys.argv[1] + '/cgroup.procs', 'w') as file: file.write('0')
say('ready')
signal.pause()
""")
"""Leaves its group for another one."""


@needs_root
def test_one_of_another_user_cannot_leave_its_group(nursery: Nursery, control_groups: str) -> None:
    script = f"echo 0 > {control_groups}/cgroup.procs; sleep 600"
    launch = nursery.launch(("/bin/sh", "-c", script), account=find_account("nobody"))
    nursery.run(nursery.actor().ensure_started(launch))
    until(lambda: "Permission denied" in nursery.log(launch), "the refusal")
    assert nursery.members(launch.incarnation) <= who_is_in(nursery.group(launch.incarnation))


def test_one_of_the_daemons_own_user_that_leaves_its_group_is_found_by_descent(
    nursery: Nursery, control_groups: str
) -> None:
    incarnation = nursery.started((*MOVING_OUT, control_groups))
    leader = nursery.run_record(incarnation).pid
    assert not who_is_in(nursery.group(incarnation))
    assert nursery.members(incarnation) == {leader}
    nursery.run(nursery.actor().ensure_stopped(incarnation, PATIENT))
    assert not is_running(leader)


@needs_root
def test_a_user_makes_groups_where_one_was_given_away_and_nowhere_else(control_groups: str) -> None:
    """As systemd gives one away with Delegate=: its folder and cgroup.procs belong to the user."""
    given = Path(control_groups, f"given-{os.getpid()}")
    given.mkdir()
    user = find_account("nobody").uid
    own = cgroup.path_in(str(given), "abc")

    def as_that_user() -> int:
        (given / "cgroup.procs").write_text("0")
        os.setresuid(user, user, user)
        assert cgroup.find_home(os.getppid()).reason.endswith("is not writable")
        assert cgroup.find_home().path == str(given)
        Path(own).mkdir()
        member = os.fork()
        if member == 0:
            Path(own, "cgroup.procs").write_text("0")
            signal.pause()
        until(lambda: cgroup.pids(own, "abc") == {member})
        assert cgroup.kill(own, "abc") == {member}
        return os.waitstatus_to_exitcode(os.waitpid(member, 0)[1])

    try:
        for path in (given, given / "cgroup.procs"):
            os.chown(path, user, -1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = -as_that_user()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert cgroup.remove(own, "abc")
    finally:
        until(lambda: not (given / "cgroup.procs").read_text())
        given.rmdir()


# ---------------------------------------------------------------- never a stranger


def intend(nursery: Nursery, group_of: object) -> Intent:
    launch = nursery.launch(OBEDIENT)
    intent = nursery.actor()._intent(launch, group_of(launch.incarnation))
    write_intent(nursery.state, intent)
    return intent


@pytest.fixture
def stranger(control_groups: str) -> Iterator[tuple[int, Path]]:
    """A process in a group of its own that nobody here started, and that group."""
    group = Path(control_groups, f"a-stranger-{os.getpid()}")
    group.mkdir()
    process = subprocess.Popen(("sleep", "600"))
    (group / "cgroup.procs").write_text(str(process.pid))
    yield process.pid, group
    process.kill()
    process.wait()
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_record_that_names_another_group_signals_nobody_in_it(
    nursery: Nursery, obedient_process: str, stranger: tuple[int, Path], tmp_path: Path
) -> None:
    """Not the group above it, in which everybody is; not a stranger's; not through a link; and nothing that is none."""
    pid, group = stranger
    run = nursery.run_record(obedient_process)
    linked, faked = tmp_path / "linked", tmp_path / f"reconciler-{obedient_process}"
    linked.symlink_to(group.parent)
    faked.mkdir()
    (faked / "cgroup.procs").write_text(f"{pid}\n")
    (faked / "cgroup.kill").write_text("")
    inside = group / f"reconciler-{obedient_process}"
    forged = [
        *(str(group.parent), str(group), f"{group}/../{group.name}", f"{linked}/{group.name}", "", "/", "relative"),
        *(str(faked), f"{linked}/{group.name}/{inside.name}", f"{inside}/..", f"{group.parent}/reconciler-another"),
    ]
    inside.mkdir()
    (inside / "cgroup.procs").write_text(str(pid))
    try:
        for path in forged:
            assert cgroup.pids(path, obedient_process) == frozenset(), path
            assert cgroup.kill(path, obedient_process) == frozenset(), path
            assert cgroup.remove(path, obedient_process), path
        assert is_running(pid)
        assert (faked / "cgroup.kill").read_text() == ""
        assert inside.exists()
        assert is_running(run.pid)
    finally:
        (group / "cgroup.procs").write_text(str(pid))
        inside.rmdir()


def test_a_number_that_a_stranger_got_after_the_group_was_listed_is_no_member(
    nursery: Nursery, obedient_process: str, stranger: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, _ = stranger
    monkeypatch.setattr(cgroup, "pids", lambda *_: frozenset({pid}))
    assert nursery.members(obedient_process) == {nursery.run_record(obedient_process).pid}


def test_a_daemon_does_not_kill_a_group_that_it_is_in_itself(control_groups: str) -> None:
    """One that a job started, on the very state directory that the job was started from."""
    group = Path(cgroup.path_in(control_groups, "abc"))
    group.mkdir()
    source = f"from reconciler import cgroup; print(sorted(cgroup.kill({str(group)!r}, 'abc')))"
    try:
        script = f"echo 0 > {group}/cgroup.procs && exec {os.sys.executable} -c {source!r}"
        result = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"
    finally:
        until(lambda: cgroup.remove(str(group), "abc"))
    assert not group.exists()


# ---------------------------------------------------------------- where they can be had

HOST = "25 30 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
OLD = "30 24 0:26 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer"
HYBRID = f"{OLD}\n31 24 0:27 / /sys/fs/cgroup/unified rw - cgroup2 none rw"
BOUND = "41 40 0:22 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw"


@pytest.mark.parametrize(
    ("own", "mounts", "found"),
    [
        ("0::/system.slice/reconciler.service", HOST, "/sys/fs/cgroup/system.slice/reconciler.service"),
        ("9:freezer:/x\n0::/user.slice", HYBRID, "/sys/fs/cgroup/unified/user.slice"),
        ("0::/", HYBRID, "/sys/fs/cgroup/unified"),
        ("0::/docker/abc/below", BOUND, "/sys/fs/cgroup/below"),
        ("0::/docker/abcdef", BOUND, None),
        ("0::/../other", HOST, None),
        ("0::/gone (deleted)", HOST, None),
        ("4:freezer:/x", OLD, None),
        ("0::/", OLD, None),
        ("", HOST, None),
    ],
)
def test_a_group_is_found_by_what_the_kernel_says(
    own: str, mounts: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_read", {"/proc/7/cgroup": own, "/proc/self/mountinfo": mounts}.__getitem__)
    assert cgroup.of_process(7) == found


def fork_into(group: str) -> str:
    """What the way in which shims fork says, in a process with one thread, as a shim has: where, and whether born."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(Path(shim.__file__).parent)!r}); import shim;"
        "pid, born = shim.fork_into(os.fsencode(sys.argv[1]));"
        "text = open('/proc/self/cgroup').read();"
        "(print(text, flush=True), os._exit(0)) if pid == 0 else (os.waitpid(pid, 0), print(born))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, group], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_leader_is_born_in_its_group_and_nothing_has_to_be_moved(control_groups: str) -> None:
    """To move it there takes the kernel 5 to 20 ms, which every start would wait for."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (5, 7):
        pytest.skip("Linux 5.7 is the first that can")
    group = cgroup.path_in(control_groups, "born")
    Path(group).mkdir()
    try:
        said = fork_into(group)
    finally:
        cgroup.remove(group, "born")
    assert Path(group).name in said
    assert said.endswith("True\n")


def test_where_no_child_can_be_born_in_a_group_it_is_forked_as_ever(tmp_path: Path) -> None:
    assert fork_into(str(tmp_path / "no group")).endswith("False\n")

"""Who belongs to one incarnation: its verified living processes. Linux only, standard library only.

Where it has a control group of its own, whoever is in that is a member, whatever else was lost. Besides: while the shim
lives it is the subreaper, and descent from it is the proof: it covers double-forked and setsid ones. Only when the shim
is dead is all of /proc swept, and a process counts as a member by one of these proofs:

1. its environment carries the incarnation's marker;
2. it is in the leader's session, and that session is still the same one: the leader is there (a zombie holds its number
   too), or a marked process is in it (the kernel reuses a session id, but never while one member lives);
3. it descends from a process counted by 1 or 2.

A process in a session of that number without any of these is not ours: better left alone than a stranger killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from reconciler import cgroup
from reconciler.identity import ProcStat, descendants, is_alive, read_marker, read_stat

MARKER = "RECONCILER_INCARNATION"
"""The environment variable that every leader is started with; its value is the incarnation's id."""

_WALKS = 4
"""/proc/PID/task/TID/children may skip entries while siblings exit (proc_pid_task_children(5)), and an orphan moves to
the shim after its listing was read: a walk counts once a second one agrees. A tree that forks for ever never agrees."""


def members(
    *,
    incarnation: str,
    pid: int,
    start_ticks: int,
    session_id: int,
    shim_pid: int,
    shim_start_ticks: int,
    group: str | None = None,
) -> tuple[ProcStat, ...]:
    """Living, verified members of one incarnation of this boot, the leader included; zombies are left out.

    Args:
        incarnation: its id, the value of `MARKER`.
        pid: the leader's pid, from the run record (as all that follow).
        start_ticks: the leader's start, clock ticks after boot.
        session_id: the session the leader was started in.
        shim_pid: the shim's pid.
        shim_start_ticks: the shim's start, clock ticks after boot.
        group: path of its control group, from the intent; None: it was started without.

    Returns:
        Members by pid. Empty: nothing of it lives (only a shim that is about to end may).

    Raises:
        OSError: /proc could not be read; who lives is unknown.
    """
    found = _related(incarnation, pid, start_ticks, session_id, shim_pid, shim_start_ticks)
    if group is None:
        return found
    everyone = {stat.pid: stat for stat in (*_grouped(group, incarnation), *found)}
    return tuple(everyone[member] for member in sorted(everyone))


def _grouped(group: str, incarnation: str) -> Iterator[ProcStat]:
    """Living members of the control group."""
    for pid in cgroup.pids(group, incarnation) - {os.getpid()}:
        stat = read_stat(pid)
        # in this order: what was listed may have ended, and its number be a stranger's
        where = cgroup.of_process(pid)
        if stat is not None and not stat.gone and where is not None and f"{where}/".startswith(f"{group}/"):
            yield stat


def _related(
    incarnation: str, pid: int, start_ticks: int, session_id: int, shim_pid: int, shim_start_ticks: int
) -> tuple[ProcStat, ...]:
    """Living members by descent and marks."""
    if is_alive(shim_pid, shim_start_ticks):
        found = _walk(shim_pid)
        if is_alive(shim_pid, shim_start_ticks):
            return found
        # the shim died during the walk: what moved away from under it was missed
    return _sweep(incarnation, pid, start_ticks, session_id)


def _walk(shim_pid: int) -> tuple[ProcStat, ...]:
    """Living descendants of the shim, by pid."""
    if not Path(f"/proc/{shim_pid}/task/{shim_pid}/children").exists():
        # a kernel without CONFIG_PROC_CHILDREN (or the shim has just died, and the caller looks again)
        return _descending(_table(), {shim_pid}, roots_included=False)
    previous: tuple[ProcStat, ...] | None = None
    for _ in range(_WALKS):
        found = tuple(sorted(descendants(shim_pid), key=lambda stat: stat.pid))
        if previous is not None and [s.pid for s in found] == [s.pid for s in previous]:
            break
        previous = found
    return found


def _sweep(incarnation: str, pid: int, start_ticks: int, session_id: int) -> tuple[ProcStat, ...]:
    """Members when no shim is left to prove descent; see the module's docstring for the numbers."""
    table = _table()
    own = os.getpid()
    later = [s for s in table.values() if s.start_ticks >= start_ticks and s.pid != own]
    marked = {s.pid for s in later if not s.gone and read_marker(s.pid, MARKER) == incarnation}  # 1
    leader = table.get(pid)
    same_session = (leader is not None and leader.start_ticks == start_ticks) or any(
        table[p].session_id == session_id for p in marked
    )
    in_session = {s.pid for s in later if same_session and s.session_id == session_id}  # 2
    found = _descending(table, marked | in_session, roots_included=True)  # 3
    return tuple(s for s in found if s.pid != own)


def _table() -> dict[int, ProcStat]:
    """Every process by pid, zombies included."""
    stats = (read_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - cheaper than Path
    return {stat.pid: stat for stat in stats if stat is not None}


def _descending(table: dict[int, ProcStat], roots: Iterable[int], *, roots_included: bool) -> tuple[ProcStat, ...]:
    """Living processes of `table` below `roots`, by pid."""
    below: dict[int, list[int]] = {}
    for stat in table.values():
        below.setdefault(stat.parent_pid, []).append(stat.pid)
    start = set(roots)
    seen = set(start)
    queue = sorted(start)
    while queue:
        for child in below.get(queue.pop(), ()):
            if child not in seen:
                seen.add(child)
                queue.append(child)
    wanted = seen if roots_included else seen - start
    return tuple(table[p] for p in sorted(wanted) if p in table and not table[p].gone)

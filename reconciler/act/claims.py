"""What a run record claims of processes that live, held against what these are.

Pid, start, boot and namespace say which process is meant. That it is the leader, or the shim, of this incarnation is a
claim of the record alone, and a record may be damaged, copied, or put back from another time: everything below a shim,
and in a leader's session, would be ended on its word.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from reconciler import census, cgroup, identity
from reconciler.journal import incarnations
from reconciler.journal.incarnations import Intent, Run
from reconciler.journal.layout import StateDir

_ENDING_S = 0.5


def contradiction(state: StateDir, intent: Intent, run: Run) -> str | None:
    """What of the record cannot be true, or is not proved; None: nothing speaks against it, or nothing of it lives.

    1. It names this very process.
    2. Its shim lives, and does not hold this record's folder open, as a shim does from its start to its end. One that
       holds nothing at all is waited for: the kernel closes what a process had some milliseconds before it is gone.
    3. Its shim lives, and its leader is no child of it.
    4. Its shim is gone, and its leader carries the mark of another incarnation.
    5. Its shim is gone, and another record names its leader as its own leader or shim.
    6. Its shim is gone, and nothing but the record says that this is its leader: no mark, since programs that rename
       themselves may wipe it, nor is it in the control group, nor has it the log for its output.

    Raises:
        OSError: /proc, or the records, could not be read.
    """
    incarnation = intent.id
    shim = identity.read_stat(run.shim_pid)
    leader = identity.read_stat(run.pid)
    shim_lives = shim is not None and shim.start_ticks == run.shim_start_ticks and not shim.gone
    leader_lives = leader is not None and leader.start_ticks == run.start_ticks and not leader.gone
    if os.getpid() in ({run.shim_pid} if shim_lives else set()) | ({run.pid} if leader_lives else set()):  # 1
        return "its record names this very process"
    if shim_lives and not _holds(run.shim_pid, state, incarnation):
        if not _is_ending(run.shim_pid, run.shim_start_ticks):  # 2
            return f"pid {run.shim_pid} is not its shim"
        shim_lives = False
    if shim_lives:
        if leader_lives and leader is not None and leader.parent_pid != run.shim_pid:  # 3
            return f"pid {run.pid} is no child of its shim"
    elif leader_lives:
        mark = identity.read_marker(run.pid, census.MARKER)
        if mark not in (None, incarnation):  # 4
            return f"pid {run.pid} belongs to another incarnation"
        if other := _named_elsewhere(state, incarnation, run):  # 5
            return f"pid {run.pid} is also in the record of {other}"
        if mark is None and not _is_in_group(run.pid, intent) and not _writes_to(run.pid, intent.log):  # 6
            return f"nothing but its record says that pid {run.pid} is its leader"
    return None


def _is_in_group(pid: int, intent: Intent) -> bool:
    return intent.group is not None and pid in cgroup.pids(intent.group, intent.id)


def _writes_to(pid: int, log: str) -> bool:
    """Whether its standard output or error is that file still."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{descriptor}"), os.stat(log)):  # noqa: PTH116
                return True
    return False


def _holds(shim: int, state: StateDir, incarnation: str) -> bool:
    """Whether the shim has the folder of the records open; taken to be so where descriptors may not be looked at."""
    try:
        folder = os.stat(state.run / incarnation)  # noqa: PTH116 - compared with what follows
        descriptors = os.listdir(f"/proc/{shim}/fd")  # noqa: PTH208
    except PermissionError:
        return True
    except FileNotFoundError:
        return False
    for descriptor in descriptors:
        with suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{shim}/fd/{descriptor}"), folder):  # noqa: PTH116
                return True
    return False


def _is_ending(pid: int, start_ticks: int) -> bool:
    """Whether a process has let go of all its descriptors, and is gone within a moment."""
    until = time.monotonic() + _ENDING_S
    with suppress(FileNotFoundError):
        while identity.is_alive(pid, start_ticks):
            if os.listdir(f"/proc/{pid}/fd") or time.monotonic() > until:  # noqa: PTH208
                return False
            time.sleep(0.001)  # synchronous room: nobody else's turn is taken
    return True


def _named_elsewhere(state: StateDir, incarnation: str, run: Run) -> str | None:
    for other in incarnations.list_ids(state):
        if other == incarnation:
            continue
        theirs = incarnations.read(state.run / other).run
        if isinstance(theirs, Run) and theirs.boot_id == run.boot_id:
            named = ((theirs.pid, theirs.start_ticks), (theirs.shim_pid, theirs.shim_start_ticks))
            if (run.pid, run.start_ticks) in named:
                return other
    return None

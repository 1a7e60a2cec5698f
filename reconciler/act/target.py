"""An incarnation that may be signalled: proven to be ours first, killed to the last member then."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from reconciler import census, cgroup, identity
from reconciler.act.claims import contradiction
from reconciler.act.waiting import readable_within
from reconciler.clock import Clock
from reconciler.errors import ActError, NotOurs
from reconciler.journal import incarnations
from reconciler.journal.incarnations import Run, StopRecord, Undying, Unreadable
from reconciler.journal.layout import StateDir, is_locked

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.01, 0.25
"""Between two rounds of killing, doubling: a killed process takes a moment, one in a driver call takes long."""
_UNDYING_S = 1.0
"""A process dies of SIGKILL within ms, a large one within some hundred; one that lives longer is recorded."""
_SHIM_END_S = 5.0
"""How long a shim without descendants may take to record the exit and go."""
_PROCESS_GROUP = 1 << 2
"""PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9 (pidfd_send_signal(2))."""


class Target(Struct, frozen=True):
    """An incarnation of this boot and this pid namespace, with readable records."""

    id: str
    run: Run
    stop: StopRecord | Unreadable | None
    group: str | None
    """Path of its control group; None: it has none."""
    state: StateDir

    @contextmanager
    def leader(self) -> Iterator[int | None]:
        """A pidfd of exactly the recorded leader, for as long as it is needed; None when it is gone.

        Raises:
            NotOurs: it could not be told.
        """
        try:
            leader = identity.open_pidfd(self.run.pid, self.run.start_ticks)
        except OSError as error:
            raise NotOurs(f"pid {self.run.pid}: its identity cannot be verified: {error}") from error
        try:
            yield leader
        finally:
            if leader is not None:
                os.close(leader)

    def members(self) -> tuple[identity.ProcStat, ...]:
        """Its living processes, the leader included.

        Raises:
            NotOurs: it could not be told.
        """
        run = self.run
        try:
            return census.members(
                incarnation=self.id,
                pid=run.pid,
                start_ticks=run.start_ticks,
                session_id=run.session_id,
                shim_pid=run.shim_pid,
                shim_start_ticks=run.shim_start_ticks,
                group=self.group,
            )
        except OSError as error:
            raise NotOurs(f"{self.id}: its processes cannot be told: {error}") from error

    async def linger(self, seconds: float, clock: Clock) -> None:
        """Let what is left end by itself; a shim that goes tells that nothing is left."""
        shim = self._open_shim()
        if shim is not None:
            try:
                await readable_within(shim, seconds, clock)
            finally:
                os.close(shim)

    async def kill(self, leader: int | None, clock: Clock) -> None:
        """SIGKILL every member, again and again until none lives (a forking tree races; stopped ones die too).

        Who lives on for long is recorded as undying: it may be so for hours, and others must not wait for it.

        Args:
            leader: its pidfd, if it lived when the caller began: its group is then killed in one call, forks included.
            clock: for the pauses between rounds.

        Raises:
            NotOurs: who lives could not be told.
            ActError: a member may not be signalled (it changed its user).
        """
        pause, began, recorded = _FIRST_PAUSE_S, clock.now(), False
        shim = self._open_shim()
        try:
            while members := self.members():
                told = self._kill_cgroup()
                if leader is not None:
                    _kill_group(leader)
                _kill_each(tuple(member for member in members if member.pid not in told))
                if shim is None:
                    await clock.sleep(pause)
                elif await readable_within(shim, pause, clock):
                    os.close(shim)
                    shim = None
                pause = min(pause * 2, _LAST_PAUSE_S)
                if not recorded and clock.now().since(began) >= _UNDYING_S:
                    with suppress(OSError):  # in the next round, then
                        incarnations.write_undying(self.state, self.id, Undying(began))
                        recorded = True
            if shim is not None:
                # it has yet to record the leader's end and to let go of the lock; a stopped shim is not waited for
                await readable_within(shim, _SHIM_END_S, clock)
        finally:
            if shim is not None:
                os.close(shim)

    def _kill_cgroup(self) -> frozenset[int]:
        """SIGKILL its control group in one call, where it has one and the kernel can; whom that was said to."""
        if self.group is None:
            return frozenset()
        try:
            return cgroup.kill(self.group, self.id)
        except OSError as error:
            raise NotOurs(f"{self.id}: its control group cannot be told: {error}") from error

    def _open_shim(self) -> int | None:
        try:
            return identity.open_pidfd(self.run.shim_pid, self.run.shim_start_ticks)
        except OSError as error:
            raise NotOurs(f"pid {self.run.shim_pid}: its identity cannot be verified: {error}") from error


def examine(state: StateDir, boot_id: str, incarnation: str) -> Target | None:
    """What of this incarnation may be signalled; None when nothing of it can live.

    1. No records: it was put away, or never was. Or it is of another boot, readable or not. Nothing lives.
    2. Its intent or its run record cannot be read: not ours to signal.
    3. No process is recorded, and its lock is free: it was never started. With the lock held, it is about to be.
    4. Recorded in another pid namespace: its pids mean nothing here. With the lock free its container went down. The
       same if its run record is of another boot than its intent.
    5. What lives under its pids contradicts it: not ours to signal.
    6. Otherwise its pids can be compared with what runs.

    Raises:
        NotOurs: 2, 5, and 4 while the lock is held.
        ActError: 3 while the lock is held.
    """
    records = incarnations.read(state.run / incarnation)
    intent, run = records.intent, records.run
    if (intent is None and run is None) or records.of_another_boot(boot_id):  # 1
        return None
    if intent is None or isinstance(intent, Unreadable) or isinstance(run, Unreadable):  # 2
        raise NotOurs(f"{incarnation}: {'; '.join(records.unreadable) or 'it has no intent'}; nothing was signalled")
    held = _is_held(incarnations.lock_path(state, intent.kind, intent.name))
    if run is None:  # 3
        if held and records.exit is None:
            raise ActError(f"{intent.name}: incarnation {incarnation} is still being started")
        return None
    elsewhere = "pid namespace" if run.pid_namespace != Path("/proc/self/ns/pid").stat().st_ino else None
    elsewhere = "boot" if run.boot_id != boot_id else elsewhere
    if elsewhere is not None:  # 4
        if held:
            raise NotOurs(f"{intent.name}: its pids are of another {elsewhere}; nothing was signalled")
        return None
    try:
        doubt = contradiction(state, intent, run)
    except OSError as error:
        raise NotOurs(f"{intent.name}: its processes cannot be told: {error}; nothing was signalled") from error
    if doubt is not None:  # 5
        raise NotOurs(f"{intent.name}: {doubt}; nothing was signalled", hint=f"see {records.path}")
    return Target(incarnation, run, records.stop, intent.group, state)  # 6


def _is_held(lock: Path) -> bool:
    try:
        return is_locked(lock)
    except OSError as error:
        raise NotOurs(f"{lock}: {error.strerror}; nothing was signalled") from error


def _kill_group(leader: int) -> None:
    """SIGKILL the group that the leader leads; where the kernel cannot, the members one by one have to do."""
    try:
        signal.pidfd_send_signal(leader, signal.SIGKILL, None, _PROCESS_GROUP)
    except ProcessLookupError:
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise ActError(f"a process group cannot be killed: {error.strerror}") from error


def _kill_each(members: tuple[identity.ProcStat, ...]) -> None:
    refused: list[str] = []
    for member in members:
        try:
            identity.send_signal(member.pid, member.start_ticks, signal.SIGKILL)
        except PermissionError:
            refused.append(str(member.pid))
        except OSError as error:
            raise NotOurs(f"pid {member.pid}: its identity cannot be verified: {error}") from error
    if refused:
        raise ActError(
            f"not permitted to end pid {', '.join(refused)}", hint="it changed its user; end it as that user"
        )

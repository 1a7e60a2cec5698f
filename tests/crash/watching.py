"""What each process of the program is about to do, in words; and who is killed at which of those moments."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import stopper
from msgspec import Struct
from stopper import Asked

from reconciler.census import MARKER
from reconciler.identity import read_marker, read_stat

BY_PATH = {
    "open", "creat", "mkdir", "rmdir", "unlink", "chmod", "chown", "truncate", "mknod", "rename", "link", "symlink",
}  # fmt: skip
BY_FOLDER = {
    "openat", "mkdirat", "mknodat", "unlinkat", "fchmodat", "fchmodat2", "renameat", "renameat2", "linkat", "utimensat",
}  # fmt: skip
BY_DESCRIPTOR = {
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "sendto", "sendmsg", "sendmmsg", "fsync",
    "fdatasync", "ftruncate", "fchmod", "fchown", "flock", "fallocate",
}  # fmt: skip
SIGNALS = {"kill", "tkill", "tgkill", "pidfd_send_signal", "rt_sigqueueinfo"}
FORKS = {"clone", "clone3", "fork", "vfork"}
PLAIN = {"setsid", "prctl", "listen"}
"""Told by their name alone; of prctl only the becoming of a subreaper is asked about."""

_SAME = {
    "openat": "open", "creat": "open", "mkdirat": "mkdir", "unlinkat": "unlink", "renameat": "rename",
    "renameat2": "rename", "linkat": "link", "fchmodat": "chmod", "fchmodat2": "chmod", "pwrite64": "write",
    "writev": "write", "pwritev": "write", "pwritev2": "write",
}  # fmt: skip
"""Which of these it is lies with the C library and the Python at hand."""

_HEX = re.compile(r"[0-9a-f]{32}")
_GROUP = re.compile(r"/reconciler-[0-9a-f]{32}(.*)$")
_AT_FDCWD = -100 & 0xFFFFFFFF
_NUMBERED = re.compile(r"\b(job)-\d+")
_PAST = re.compile(r"(ended/\.ID/).*")
_WAL_FRAME, _WAL_COMMIT = 24, slice(4, 8)  # https://www.sqlite.org/fileformat2.html#the_write_ahead_log

ROLES = {"daemon": "fork server", "fork server": "shim", "shim": "leader", "leader": "program", "program": "program"}
"""Of a process → of what it forks."""


WORDS = {
    ("daemon", b"?"): "announce a start",
    ("shim", b"+"): "say that it has an order",
    ("shim", b"1"): "open the gate",
    ("leader", b"1"): "say why it cannot be executed",  # with the exit code in front, 126 or 127
}
"""What is said between ours: who says it, the first byte → the deed."""


class Point(Struct, frozen=True, order=True):
    """A moment: a process of this role is about to do this, for the so-many-th time in its turn."""

    role: str
    deed: str
    occurrence: int = 1

    @property
    def name(self) -> str:
        return f"{self.role}: {self.deed}"

    @property
    def unlisted(self) -> bool:
        """What SQLite does lies with its version, and whether there are control groups with the box."""
        return "journal.sqlite" in self.deed or "control group" in self.deed or self.deed in ("fsync .", "fdatasync .")

    def __str__(self) -> str:
        return f"{self.name} ({self.occurrence})"


@dataclass
class Trap:
    """At `point`, end `victim`: the process that stands there, or the daemon."""

    point: Point
    victim: str
    """A role."""
    then: Trap | None = None
    """Set once this one has sprung; occurrences count from there."""
    sprung: bool = False

    def __str__(self) -> str:
        words = f"{self.point}" if self.victim == self.point.role else f"{self.point}, the {self.victim} killed"
        return f"{words}; then {self.then}" if self.then else words

    def again(self) -> Trap:
        """The same, set anew."""
        self.sprung = False
        if self.then is not None:
            self.then.again()
        return self

    @property
    def last(self) -> Trap:
        return self.then.last if self.then else self


@dataclass
class Watcher(threading.Thread):
    """Answers every question of the filter, and keeps a list."""

    state: Path
    every: bool = False
    """Count each call, not the first alone of several alike in a row."""
    daemon_pid: int | None = None
    points: list[Point] = field(default_factory=list)
    """What was about to be done, since `begin`."""
    afterwards: list[Point] = field(default_factory=list)
    """The same, since a trap sprung."""
    strangers: list[str] = field(default_factory=list)
    """Signals to processes that are not ours."""
    trap: Trap | None = None
    problem: BaseException | None = None
    paused: bool = False
    """What is done now is no part of the turn."""

    def __post_init__(self) -> None:
        super().__init__(daemon=True, name="watcher")
        self._poll = select.epoll()
        self._wake_out, self._wake_in = os.pipe()
        self._poll.register(self._wake_out, select.EPOLLIN)
        self._listeners: set[int] = set()
        self._roles: dict[tuple[int, int], str] = {}
        self._last: dict[int, str] = {}
        self._committing: set[int] = set()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._over = False

    def __hash__(self) -> int:
        return id(self)

    # ------------------------------------------------------------ from the test's thread

    def add(self, pid: int) -> None:
        """Answer for this process, which is the daemon from now on."""
        listener = stopper.fetch(pid)
        with self._lock:
            self.daemon_pid = pid
            stat = read_stat(pid)
            assert stat is not None
            self._roles[pid, stat.start_ticks] = "daemon"
            self._listeners.add(listener)
        self._poll.register(listener, select.EPOLLIN)

    def begin(self, trap: Trap | None) -> None:
        """A new turn: count from one again."""
        with self._lock:
            self.points, self.afterwards, self.trap, self.paused = [], [], trap, False
            self._counts.clear()
            self._last.clear()

    def close(self) -> None:
        self._over = True
        os.close(self._wake_in)
        self.join()
        for fd in (*self._listeners, self._wake_out):
            os.close(fd)
        self._poll.close()

    # ------------------------------------------------------------ in its own thread

    def run(self) -> None:
        while not self._over:
            for fd, event in self._poll.poll():
                if fd == self._wake_out:
                    continue
                if event & select.EPOLLIN:
                    asked = stopper.receive(fd)
                    if asked is not None:
                        self._answer(asked)
                elif event & select.EPOLLHUP:  # the last process behind it is gone
                    self._poll.unregister(fd)
                    with self._lock:
                        self._listeners.discard(fd)
                    os.close(fd)

    def _answer(self, asked: Asked) -> None:
        try:
            with self._lock:
                self._consider(asked)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it was killed meanwhile, by somebody else
        except BaseException as problem:  # noqa: BLE001 - told by the test; a caller must not stand still for ever
            self.problem = self.problem or problem
        finally:
            stopper.go_on(asked)

    def _consider(self, asked: Asked) -> None:
        pid = _group_of(asked.thread)
        role = self._role(pid)
        deed = self._deed(asked, pid, role)
        if deed is None:
            return
        alike = deed.startswith("write ") and self._last.get(pid) == deed
        self._last[pid] = deed
        if self.paused or (alike and not self.every):
            return
        self._counts[role, deed] += 1
        point = Point(role, deed, self._counts[role, deed])
        self.points.append(point)
        self.afterwards.append(point)
        if self.trap is not None and not self.trap.sprung and self.trap.point == point:
            trap, self.trap = self.trap, self.trap.then or self.trap
            trap.sprung = True
            self.afterwards = []
            self._counts.clear()
            self._last.clear()
            self._kill(pid if trap.victim == role else self.daemon_pid)

    def _kill(self, pid: int | None) -> None:
        if pid is None:
            return
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                assert poll.poll(10_000), "it does not die"
            finally:
                os.close(pidfd)

    def _role(self, pid: int) -> str:
        stat = read_stat(pid)
        if stat is None:
            raise ProcessLookupError
        identity = (pid, stat.start_ticks)
        role = self._roles.get(identity)
        if role is None:
            parent = read_stat(stat.parent_pid)
            above = self._roles.get((parent.pid, parent.start_ticks)) if parent is not None else None
            if above is not None:
                role = ROLES[above]
            else:  # whoever forked it is gone
                role = {"reconciler-fork": "shim", "reconciler-shim": "leader"}.get(_comm(pid), "program")
            self._roles[identity] = role
        if role == "leader" and _comm(pid) != "reconciler-shim":
            role = self._roles[identity] = "program"
        return role

    # ------------------------------------------------------------ in words

    def _deed(self, asked: Asked, pid: int, role: str) -> str | None:
        """What the call does; None: nothing that outlives the process, or not the program's own doing."""
        if role == "program" or stopper.is_thread_creation(asked):
            return None
        call, args = asked.call, asked.args
        if call in SIGNALS:
            return self._signal(asked, pid)
        if call in FORKS:
            return "fork"
        if call in PLAIN:
            return call
        if call == "bind":  # any other is the proof that a port is free, which ends with its socket
            family = int.from_bytes(stopper.memory(asked.thread, args[1], 2), sys.byteorder)
            return "bind control.sock" if family == socket.AF_UNIX else None
        if call == "execve":
            return "execve"
        if call in BY_PATH:
            path = self._named(_cwd(pid) / stopper.text(asked.thread, args[0]))
        elif call in BY_FOLDER:
            path = self._named(_folder(pid, args[0]) / stopper.text(asked.thread, args[1]))
        elif call in BY_DESCRIPTOR:
            return self._written(asked, pid, role)
        else:
            raise AssertionError(f"no words for {call}")
        return f"{_SAME.get(call, call)} {path}" if path is not None else None

    def _written(self, asked: Asked, pid: int, role: str) -> str | None:
        call, target = _SAME.get(asked.call, asked.call), _target(pid, asked.args[0])
        if target.name.startswith("pipe:"):
            return f"{call} pipe"
        if target.name.startswith("socket:"):
            if asked.call == "sendmsg":
                return f"sendmsg {ROLES[role]}"
            start = stopper.memory(asked.thread, asked.args[1], min(asked.args[2], 60)) if call == "sendto" else b""
            # an engine told to do something, or one of ours; questions and answers change nothing
            told = WORDS.get((role, start[:1]))
            return f"sendto {start.split(b' HTTP')[0].decode()}" if start.startswith(b"POST ") else told
        path = self._named(target)
        if path is None or (call == "flock" and not asked.args[1] & fcntl.LOCK_EX):
            return None  # a shared lock is a look at who holds it, and ends with whoever looks
        if path.endswith("-wal") and call == "write":
            if asked.args[2] == _WAL_FRAME:
                header = stopper.memory(asked.thread, asked.args[1], _WAL_FRAME)
                (self._committing.add if any(header[_WAL_COMMIT]) else self._committing.discard)(pid)
            if pid in self._committing:
                return f"{call} {path}, the commit"
        return f"{call} {path}"

    def _named(self, target: Path) -> str | None:
        """A path below the state directory, without what differs from run to run; None: it lies elsewhere."""
        inside = os.path.relpath(target, self.state)
        if inside.startswith(".."):
            group = _GROUP.search(str(target))
            return f"control group{group[1]}" if group else None
        if inside.startswith("sim/"):
            return None
        return _PAST.sub(r"\1*", _NUMBERED.sub(r"\1", _HEX.sub("ID", inside)))

    def _signal(self, asked: Asked, pid: int) -> str:
        by_descriptor = asked.call == "pidfd_send_signal"
        target = _pid_of(pid, asked.args[0]) if by_descriptor else asked.args[0] & 0xFFFFFFFF
        number = asked.args[2 if asked.call == "tgkill" else 1]
        whom = "own process" if target == pid else self._whom(target)
        if whom == "stranger":
            self.strangers.append(f"{asked.call} {number} to {target}: {_command(target)}")
        return f"{asked.call} {signal.Signals(number).name if number else 0} to {whom}"

    def _whom(self, pid: int) -> str:
        with suppress(OSError):
            stat = read_stat(pid)
            if stat is None:
                return "program"  # it has just gone; its number means it still
            if (role := self._roles.get((pid, stat.start_ticks))) is not None:
                return role
            if read_marker(pid, MARKER) is not None or stat.gone:
                return "program"
            parent = read_stat(stat.parent_pid)
            if parent is not None and self._roles.get((parent.pid, parent.start_ticks)) == "shim":
                return self._role(pid)  # it has done nothing yet
        return "stranger"


def _group_of(thread: int) -> int:
    for line in Path(f"/proc/{thread}/status").read_text().splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise ProcessLookupError


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _cwd(pid: int) -> Path:
    return Path(f"/proc/{pid}/cwd").readlink()


def _target(pid: int, fd: int) -> Path:
    return Path(f"/proc/{pid}/fd/{fd & 0xFFFFFFFF}").readlink()


def _folder(pid: int, fd: int) -> Path:
    return _cwd(pid) if fd & 0xFFFFFFFF == _AT_FDCWD else _target(pid, fd)


def _pid_of(pid: int, fd: int) -> int:
    for line in Path(f"/proc/{pid}/fdinfo/{fd & 0xFFFFFFFF}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise AssertionError("no pidfd")


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "?"

"""Control groups of version 2: one for each incarnation, where they can be had. Linux only, standard library only.

The kernel inherits a group over every fork, whoever the parent, session and environment are: who is in the group of an
incarnation is proven to be its own, also when shim and leader were killed. Nothing rests on the group being there:
where none can be made, or one cannot be joined, descent, session and marker tell (`census`).

A group is named by its incarnation, holds no controllers, and lies in the group of the daemon that made it.
See cgroups(7) and the kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

from msgspec import Struct

_PREFIX = "reconciler-"
_ID = 32
"""Hexadecimal digits that name an incarnation."""
_YOUNG_S = 60.0
_TYPE = "cgroup2"
_SYSTEMD = "/run/systemd/system"
"""Exists exactly where systemd is the init (sd_booted(3))."""
_DELEGATED = ("user.delegate", "trusted.delegate")
"""Extended attributes that systemd puts on the group of a unit with Delegate=yes."""

_NOT_LISTED = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)
"""A group that has just gone, or a threaded one, whose processes are listed in the one above."""


class Home(Struct, frozen=True):
    """Where a process may make groups: its own group."""

    path: str | None
    """Absolute; None: nowhere."""
    reason: str = ""
    """Why nowhere, for people."""


class _Mount(Struct, frozen=True):
    """One line of /proc/PID/mountinfo."""

    device: int
    root: str
    """Path of the group that is mounted, as in /proc/PID/cgroup."""
    point: str


def find_home(pid: int | None = None) -> Home:
    """Where the process `pid` (None: this one) may make groups, by what this user may write to.

    1. No version 2 hierarchy is mounted where the group of that process can be seen.
    2. Its group is a threaded one: no groups of whole processes can be made in it.
    3. It may not be written to, or is mounted read-only.
    4. systemd manages it and has not given it away (Delegate=): for root that is no matter of permission.
    5. Otherwise there.
    """
    path = of_process(os.getpid() if pid is None else pid)
    if path is None or not os.path.isdir(path):  # noqa: PTH112 - standard library paths are text here, as in /proc
        return Home(None, "no cgroup2 hierarchy can be seen here")  # 1
    kind = _read(f"{path}/cgroup.type")
    if kind not in ("", "domain"):
        return Home(None, f"{path} is a {kind} group")  # 2
    if not all(os.access(f"{path}/{name}", os.W_OK, effective_ids=True) for name in (".", "cgroup.procs")):
        return Home(None, f"{path} is not writable")  # 3
    if os.geteuid() == 0 and os.path.isdir(_SYSTEMD) and not _is_delegated(path):  # noqa: PTH112
        return Home(None, f"{path} is managed by systemd, without Delegate=yes")  # 4
    return Home(path)  # 5


def path_in(home: str, incarnation: str) -> str:
    """Where the group of this incarnation is made."""
    return f"{home}/{_PREFIX}{incarnation}"


def names(path: str, incarnation: str) -> bool:
    """Whether `path` is named as the group of this incarnation is, and of nothing else."""
    return os.path.basename(path) == f"{_PREFIX}{incarnation}"  # noqa: PTH119


def is_ours(path: str, incarnation: str) -> bool:
    """Whether `path` is, or was, the group of this incarnation and of nothing else; False when it is not there.

    A record may be forged or of another box: a path counts only if it is named by the incarnation, leads through no
    link, and is a group of version 2.

    Raises:
        OSError: it could not be told.
    """
    if not names(path, incarnation) or os.path.realpath(path) != path:
        return False
    try:
        device = os.lstat(path).st_dev
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(device == mount.device and path.startswith(f"{mount.point}/") for mount in _mounts())


def pids(path: str, incarnation: str) -> frozenset[int]:
    """Processes in that group and in those below it; zombies are not listed. Empty when it is not ours.

    Raises:
        OSError: it could not be told.
    """
    if _is_deserted(path) or not is_ours(path, incarnation):
        return frozenset()
    found: set[int] = set()
    for folder in _below(path):
        try:
            with open(f"{folder}/cgroup.procs", "rb") as file:  # noqa: PTH123
                found.update(map(int, file.read().split()))
        except OSError as error:
            if error.errno not in _NOT_LISTED:
                raise
    if 0 in found:
        raise OSError(errno.ESRCH, "a member lives in a pid namespace that cannot be seen from here", path)
    return frozenset(found)


def _is_deserted(path: str) -> bool:
    """Whether what is there says that nobody is in it or below: nothing more has to be proven of it then."""
    return "populated 0" in _read(f"{path}/cgroup.events")


def kill(path: str, incarnation: str) -> frozenset[int]:
    """SIGKILL everybody in that group and below, forks included; whom that was said to.

    Empty: nobody, since the kernel cannot (before 5.14), or it may not be, or this very process is among them.

    Raises:
        OSError: who is in it could not be told; nobody was signalled.
    """
    members = pids(path, incarnation)
    if not members or os.getpid() in members:
        return frozenset()
    try:
        with open(f"{path}/cgroup.kill", "wb", buffering=0) as file:  # noqa: PTH123
            file.write(b"1")
    except OSError:
        return frozenset()
    return members


def remove(path: str, incarnation: str) -> bool:
    """Take that group away, with the empty ones below it; False when somebody is still in it.

    Raises:
        OSError: it could not be told whose it is.
    """
    if not is_ours(path, incarnation):
        return True
    for folder in reversed(tuple(_below(path))):
        try:
            os.rmdir(folder)  # noqa: PTH106
        except FileNotFoundError:
            continue
        except OSError as error:
            # if it is not this user's to take away, that must not hold up the rest
            return error.errno not in (errno.EBUSY, errno.ENOTEMPTY)
    return True


def remove_forsaken(home: str, known: Collection[str]) -> None:
    """Take away the empty groups of incarnations that are not among `known`: nobody else will, nor asks for them.

    A shim that makes one for a start that is then refused takes it away again, unless it is killed before. In one as
    young as that somebody may be about to be born, on the account of another daemon here.
    """
    with suppress(OSError):
        for name in os.listdir(home):  # noqa: PTH208
            incarnation = name.removeprefix(_PREFIX)
            if name == incarnation or incarnation in known:
                continue
            if len(incarnation) != _ID or incarnation.strip("0123456789abcdef"):
                continue  # no incarnation is named like that
            with suppress(OSError):  # it has gone, or somebody is in it
                if time.time() - os.stat(f"{home}/{name}").st_mtime > _YOUNG_S:  # noqa: PTH116
                    os.rmdir(f"{home}/{name}")  # noqa: PTH106


def of_process(pid: int) -> str | None:
    """Absolute path of the group that `pid` is in; None: gone, not in any, or not to be seen from here."""
    name = _own(_read(f"/proc/{pid}/cgroup"))
    return next((found for mount in _mounts() if (found := _place(name, mount)) is not None), None) if name else None


def _place(name: str, mount: _Mount) -> str | None:
    root = mount.root.rstrip("/")
    if name != root and not name.startswith(f"{root}/"):
        return None
    return (mount.point + name[len(root) :]).rstrip("/")


def _own(text: str) -> str | None:
    """The group of version 2 in the text of /proc/PID/cgroup; one beyond the namespace (`/..`) is none."""
    name = next((line[3:] for line in text.splitlines() if line.startswith("0::")), None)
    return None if name is None or name.startswith("/..") or name.endswith(" (deleted)") else name


def _mounts() -> tuple[_Mount, ...]:
    """Where version 2 is mounted, beside version 1 or alone (proc_pid_mountinfo(5))."""
    found = []
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith(f"{_TYPE} "):
            device, root, point = left.split()[2:5]
            major, minor = device.split(":")
            found.append(_Mount(os.makedev(int(major), int(minor)), root, point))
    return tuple(found)


def _is_delegated(path: str) -> bool:
    """Whether systemd has given this group away; with DelegateSubgroup= the mark is on the one above."""
    for folder in (path, os.path.dirname(path)):  # noqa: PTH120
        for name in _DELEGATED:
            with suppress(OSError):
                if os.getxattr(folder, name) == b"1":
                    return True
    return False


def _below(path: str) -> Iterator[str]:
    """The group and those below it, parents first.

    Raises:
        OSError: one of them cannot be listed.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, _ in os.walk(path, onerror=refuse):
        yield folder


def _read(path: str) -> str:
    """The text of a small file; empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
            return file.read().rstrip("\n")
    except OSError:
        return ""

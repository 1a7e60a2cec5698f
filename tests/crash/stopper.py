"""Stops processes at the boundaries of their system calls, from outside: nothing of the program knows of it.

A process installs a filter (seccomp with user notification, seccomp(2), Linux 5.9) that it, its threads and all its
descendants carry from then on, across execve too. Before each call that the filter names the kernel asks us, and the
caller stands still until we answer: let it go on, or kill somebody first. A caller that is killed then has not made
the call. Named are the calls that change what outlives the caller: files, processes, signals, messages.

Left out is what a kill does by itself (closing descriptors, dropping locks on records of a file, unmapping, giving
up timers) and what only reads: killed on either side of such a call, the same is left behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import signal
import struct
from pathlib import Path

from msgspec import Struct

LISTENER_FD = 900
"""Where a process that was filtered has its end, until it is fetched."""

CALLS = {
    "write": 1, "pwrite64": 18, "writev": 20, "sendfile": 40, "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50,
    "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "flock": 73, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "setsid": 112, "rt_sigqueueinfo": 129,
    "mknod": 133, "prctl": 157, "tkill": 200, "tgkill": 234, "openat": 257, "mkdirat": 258, "mknodat": 259,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268, "utimensat": 280,
    "fallocate": 285, "pwritev": 296, "sendmmsg": 307, "renameat2": 316, "execveat": 322, "copy_file_range": 326,
    "pwritev2": 328, "open": 2, "pidfd_send_signal": 424, "clone3": 435, "fchmodat2": 452,
}  # fmt: skip
"""By their numbers on x86-64."""
NAMES = {number: name for name, number in CALLS.items()}

_CREATING = os.O_CREAT | os.O_TRUNC
_CLONE_THREAD = 0x10000
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 38, 36
_SECCOMP, _PIDFD_GETFD = 317, 438
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 1 << 3, 1 << 5
_AUDIT_ARCH_X86_64 = 0xC000003E
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_RECV, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data
_LD, _JEQ, _JSET, _RET = 0x20, 0x15, 0x45, 0x06

_WHEN = {"open": (1, _JSET, _CREATING), "openat": (2, _JSET, _CREATING), "prctl": (0, _JEQ, _PR_SET_CHILD_SUBREAPER)}
"""Calls that matter only with such an argument: its place, the test, the value."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _filter() -> bytes:
    code: list[tuple[int, int, int, int]] = [(_LD, 0, 0, _ARCH), (_JEQ, 1, 0, _AUDIT_ARCH_X86_64), (_RET, 0, 0, _ALLOW)]
    code.append((_LD, 0, 0, _NR))
    for name, number in CALLS.items():
        if name not in _WHEN:
            code += [(_JEQ, 0, 1, number), (_RET, 0, 0, _NOTIFY)]
    for name, (place, test, value) in _WHEN.items():
        code += [
            (_JEQ, 0, 4, CALLS[name]),
            (_LD, 0, 0, _ARGS + 8 * place),
            (test, 0, 1, value),
            (_RET, 0, 0, _NOTIFY),
            (_RET, 0, 0, _ALLOW),
        ]
    code.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def install() -> None:
    """Filter this process and all that will descend from it; its end is LISTENER_FD afterwards."""
    code = _filter()
    program = _Program(len(code) // 8, ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER):  # the second before Linux 5.19
        listener = _libc.syscall(_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(program))
        if listener >= 0:
            os.dup2(listener, LISTENER_FD, inheritable=False)
            os.close(listener)
            return
    raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_SET_MODE_FILTER)")


def fetch(pid: int) -> int:
    """The listener of a process that has called `install`."""
    pidfd = os.pidfd_open(pid)
    try:
        listener: int = _libc.syscall(_PIDFD_GETFD, pidfd, LISTENER_FD, 0)
    finally:
        os.close(pidfd)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    os.set_inheritable(listener, False)
    return listener


def unavailable() -> str | None:
    """Why this machine cannot do it; None: it can. Tried out, since a container may forbid any part of it."""
    if platform.machine() != "x86_64":
        return f"the calls' numbers are those of x86-64, this is {platform.machine()}"
    hears, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            install()
            os.close(told)  # no call that the filter asks about
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        os.read(hears, 1)  # ends when the child has closed its end, or is gone
        os.close(fetch(child))
        memory(child, 0, 0)
    except OSError as error:
        return f"seccomp user notification cannot be had here: {error}"
    finally:
        os.close(hears)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


class Asked(Struct, frozen=True):
    """A call that a thread is about to make."""

    listener: int
    id: int
    thread: int
    call: str
    args: tuple[int, ...]


def receive(listener: int) -> Asked | None:
    """The next question; None: whoever asked is gone."""
    buffer = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    ident, thread, _, number, _, _, *args = struct.unpack("=QIIiIQ6Q", buffer)
    return Asked(listener, ident, thread, NAMES[number], tuple(args))


def go_on(asked: Asked) -> None:
    """Have the call made."""
    try:
        fcntl.ioctl(asked.listener, _SEND, struct.pack("=QqiI", asked.id, 0, 0, _CONTINUE))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINPROGRESS):
            raise


def is_thread_creation(asked: Asked) -> bool:
    """Whether a clone makes a thread and no process."""
    if asked.call == "clone":
        return bool(asked.args[0] & _CLONE_THREAD)
    if asked.call == "clone3":
        return bool(int.from_bytes(memory(asked.thread, asked.args[0], 8), "little") & _CLONE_THREAD)
    return False


def memory(thread: int, address: int, length: int) -> bytes:
    """What a stopped thread has there; shorter where its memory ends."""
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as file:
        file.seek(address)
        return file.read(length)


def text(thread: int, address: int) -> str:
    """The text that ends with NUL at that address."""
    found = b""
    while b"\0" not in found and len(found) < 4096:
        step = 256 - (address + len(found)) % 256  # never over the end of a page
        found += memory(thread, address + len(found), step)
    return os.fsdecode(found.partition(b"\0")[0])

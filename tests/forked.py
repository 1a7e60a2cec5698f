"""Work in a forked child, which is not to touch this process, or is to have fewer rights than it."""

from __future__ import annotations

import os
from collections.abc import Callable

STRANGER = 65534
"""User and group of nobody in particular."""


def in_child(work: Callable[[], object]) -> str:
    """What `work` returns there, or the name and text of what it raises."""
    out, back = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(work())
        except BaseException as error:  # noqa: BLE001 - a forked child has nobody else to tell
            said = f"{type(error).__name__}: {error}"
        os.write(back, said.encode())
        os._exit(0)
    os.close(back)
    with os.fdopen(out, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def as_a_plain_user(work: Callable[[], object]) -> str:
    """The same, by somebody whom file modes bind: root becomes another user for it."""

    def bound() -> object:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
        return work()

    return in_child(bound)

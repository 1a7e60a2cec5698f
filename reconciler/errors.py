"""The one error tree.

    ReconcilerError
    ├── SpecError            a set-point or overlay file is wrong (terminal: a person must edit it)
    ├── UsageError           the command line is wrong
    ├── UnknownName          nothing has the name that was asked for
    ├── StateError           the state directory or the journal cannot be used (terminal)
    │   └── DaemonRunning    another daemon holds the state directory
    ├── DriverError          NVML is not there or does not answer (transient, but for a missing driver)
    ├── ActError             an operation on the box failed (transient: the loop tries again)
    │   ├── NotOurs          the target could not be proven to be ours; nothing was signalled (terminal)
    │   └── PortInUse        the port of what was to be started is taken
    └── StalePlanError       a saved plan no longer matches the world

Data stands in fields; `str()` gives where, what, and what next.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from msgspec import Struct

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)


class Problem(Struct, frozen=True, order=True):
    """One thing that is wrong with one input: where, what, what next."""

    file: str
    line: int
    """1-based; 0 when the whole file is meant."""
    column: int
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        """`file:line:column: what`, and the hint on a line of its own."""
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{where}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")


def suggest(word: str, known: Iterable[str]) -> str | None:
    """`did you mean "x"?`, or what there is, or nothing."""
    from difflib import get_close_matches

    names = sorted(known)
    # difflib is quadratic in the length of the word
    if close := get_close_matches(word.lower()[:64], names[:1000], n=1):
        return f'did you mean "{close[0]}"?'
    if not names:
        return None
    return "known: " + ", ".join(names[:30]) + (", …" if len(names) > 30 else "")


def is_shortage(error: BaseException | None) -> bool:
    """Whether it comes of something that this process, or the box, has too few of, and may have again in a moment."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return True
        error = error.__cause__
    return False


class ReconcilerError(Exception):
    """Anything this program can tell a person about: a stable code, a message, and what to do next."""

    code = "Error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message + (f"\n  hint: {self.hint}" if self.hint else "")


class SpecError(ReconcilerError):
    """One or more files cannot be accepted; `problems` holds every one of them, in file order."""

    code = "SpecError"

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems


class UsageError(ReconcilerError):
    """The command line is wrong."""

    code = "UsageError"
    exit_code = 64


class UnknownName(ReconcilerError):  # noqa: N818 - a state of the world, named as in the messages
    """Nothing has the name that was asked for; the hint says which name comes near, or which there are."""

    code = "UnknownName"

    def __init__(self, message: str, *, name: str, known: Iterable[str]) -> None:
        super().__init__(message, hint=suggest(name, known))
        self.name = name


class StateError(ReconcilerError):
    """The state directory or the journal in it cannot be used."""

    code = "StateError"


class DaemonRunning(StateError):  # noqa: N818 - a state of the world, named as in the messages
    """Another writer holds the state directory; `pid` is its process, if it could be told."""

    code = "DaemonRunning"

    def __init__(self, message: str, *, pid: int | None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.pid = pid


class DriverError(ReconcilerError):
    """NVML is not there, or did not answer in time."""

    code = "DriverError"


class ActError(ReconcilerError):
    """An operation on the box did not succeed; the loop looks again and decides anew."""

    code = "ActError"


class NotOurs(ActError):  # noqa: N818 - a state of the world, named as in the messages
    """The target of a signal could not be proven to be ours; nothing was signalled."""

    code = "NotOurs"


class PortInUse(ActError):  # noqa: N818 - a state of the world, named as in the messages
    """Someone holds the port of what was to be started; nothing was."""

    code = "PortInUse"

    def __init__(self, message: str, *, port: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.port = port


class StalePlanError(ReconcilerError):
    """A saved plan no longer matches the spec or the box."""

    code = "StalePlan"
    exit_code = 4

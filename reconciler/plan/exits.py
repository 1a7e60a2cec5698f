"""How a process ended, in words."""

from __future__ import annotations

import signal

_SHELL = {126: "found, and cannot be run", 127: "no such program"}
"""Exit status of a shell for a command that it could not run (POSIX, Shell Command Language, 2.8.2)."""
_NAMES = {int(number): number.name for number in signal.Signals}
_KILLED = "perhaps out of memory: see `journalctl -k`"
"""SIGKILL is what the kernel ends a process with when memory is short, of the box or of a control group."""


def exit_words(exit_code: int | None, said: str | None = None, *, asked_for: bool = False) -> str:
    """`exit code 1`, `signal 11 (SIGSEGV)`, with what is known of it.

    Args:
        exit_code: 0..255, or -signal; None: unknown for ever.
        said: why it ended, if something told; it stands instead of what the number alone means.
        asked_for: nobody has to guess why it ended.
    """
    if exit_code is None:
        return f"an unknown exit code ({said})" if said else "an unknown exit code"
    words = f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
    number = exit_code - 128 if exit_code >= 0 else -exit_code  # as shells tell of a command that a signal ended
    meaning = said or _SHELL.get(exit_code) or _NAMES.get(number)
    if number == signal.SIGKILL and not said and not asked_for:
        meaning = f"{meaning}, {_KILLED}"
    return f"{words} ({meaning})" if meaning else words

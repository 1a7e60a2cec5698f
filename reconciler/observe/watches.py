"""Descriptors that become readable when a process of ours ends: what lets the loop wake at once, and not poll."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from reconciler.identity import open_pidfd

Identity = tuple[int, int]
"""pid and start ticks."""


class Watches:
    """One pidfd for each leader and shim that lives. The descriptors stay this object's own."""

    def __init__(self) -> None:
        self._open: dict[Identity, tuple[int, str]] = {}
        self._retired: list[int] = []

    def update(self, wanted: Mapping[Identity, str]) -> dict[int, str]:
        """The pidfds of `wanted` (identity → incarnation id), as descriptor → incarnation id; the gone are left out.

        A descriptor that is not in the answer any more is closed by the *next* call: until then the caller can take it
        out of its selector, and its number cannot come back as somebody else's.
        """
        self._close(self._retired)
        self._retired = [fd for identity, (fd, _) in self._open.items() if identity not in wanted]
        self._open = {identity: entry for identity, entry in self._open.items() if identity in wanted}
        for identity, incarnation in wanted.items():
            if identity not in self._open:
                with suppress(OSError):  # unknown now; asked again at the next look
                    fd = open_pidfd(*identity)
                    if fd is not None:
                        self._open[identity] = (fd, incarnation)
        return dict(self._open.values())

    def close(self) -> None:
        """Close them all."""
        self._close([*self._retired, *(fd for fd, _ in self._open.values())])
        self._retired, self._open = [], {}

    @staticmethod
    def _close(descriptors: list[int]) -> None:
        for fd in descriptors:
            os.close(fd)

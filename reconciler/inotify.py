"""What is written in folders, as the kernel tells it (inotify(7)). Linux only, standard library only.

Libraries for this look themselves at what inotify gathered, 25 times a second: of an idle daemon that was a fifth.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

# sys/inotify.h; Python has no names for these
_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
_MOVE_SELF, _UNMOUNT, _IGNORED, _ONLYDIR = 0x800, 0x2000, 0x8000, 0x0100_0000
_EVENT = struct.Struct("=iIII")  # watch, what, cookie, length of the name that follows
_READ_BYTES = 1 << 16

EDITS = _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
"""A file came, went, or was closed by who wrote to it: never one that is half written."""
WRITES = EDITS | _MODIFY
"""Also each write, to files that stay open for long."""


class Notes:
    """Gathers notes of what was written. Its descriptor is readable when there is something to `read`."""

    def __init__(self, events: int) -> None:
        """Of `EDITS` or `WRITES`, in no folder yet.

        Raises:
            OSError: a user has only so many instances (fs.inotify.max_user_instances), and they are taken.
        """
        self._events = events | _MOVE_SELF | _ONLYDIR
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        self._watches: dict[Path, int] = {}

    def fileno(self) -> int:
        """For a selector; it stays this object's."""
        return self._fd

    def follow(self, folders: Collection[Path]) -> bool:
        """Be told of exactly these from now on, as far as they are there; whether that is news of any of them.

        Of what was written there before nothing is told: look after this, once more.
        """
        kept = {folder: watch for folder, watch in self._watches.items() if folder in folders}
        for watch in {*self._watches.values()} - {*kept.values()}:
            with suppress(OSError):  # it went by itself
                self._call("inotify_rm_watch", self._fd, watch)
        self._watches = kept
        fresh = [folder for folder in folders if folder not in kept]
        for folder in fresh:
            with suppress(OSError):  # it is not there, or the user's watches are used up: asked for again the next time
                watch = self._call("inotify_add_watch", self._fd, os.fsencode(folder), self._events)
                self._watches[folder] = watch
        return any(folder in self._watches for folder in fresh)

    def read(self) -> frozenset[str]:
        """Names of what was written since the last call; an empty one stands for a folder as a whole."""
        names: set[str] = set()
        with suppress(BlockingIOError):
            while True:
                data, at = os.read(self._fd, _READ_BYTES), 0
                while at < len(data):
                    watch, what, _, length = _EVENT.unpack_from(data, at)
                    at += _EVENT.size + length
                    names.add(os.fsdecode(data[at - length : at].rstrip(b"\0")))
                    if what & (_MOVE_SELF | _UNMOUNT | _IGNORED):  # what has this name from now on is another folder
                        self._watches = {folder: w for folder, w in self._watches.items() if w != watch}
                        if what & _MOVE_SELF:
                            with suppress(OSError):
                                self._call("inotify_rm_watch", self._fd, watch)
        return frozenset(names)

    def close(self) -> None:
        """Be told of nothing any more."""
        os.close(self._fd)

    def _call(self, name: str, *arguments: int | bytes) -> int:
        answer = int(getattr(self._libc, name)(*arguments))
        if answer < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return answer

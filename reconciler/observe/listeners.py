"""Who listens on which TCP port, as the kernel says."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

from reconciler.sockets import LISTENING, sockets


def listening(ports: Collection[int]) -> dict[int, frozenset[int]]:
    """Inodes of the sockets that listen on each of `ports`; ports that nobody listens on are left out.

    A socket that is bound and does not listen yet (vLLM while it loads) is not here: nobody can connect to it.

    Raises:
        OSError: the kernel could not be asked; unknown.
    """
    if not ports:
        return {}
    found: dict[int, set[int]] = {}
    for port, inode in sockets(LISTENING):
        if port in ports:
            found.setdefault(port, set()).add(inode)
    return {port: frozenset(inodes) for port, inodes in found.items()}


def holders(inodes: Collection[int], pids: Iterable[int]) -> Iterator[int]:
    """Those of `pids` that hold one of the sockets `inodes`.

    Raises:
        PermissionError: nobody seen so far does, and the descriptors of one of `pids` may not be seen.
    """
    links = {f"socket:[{inode}]" for inode in inodes}
    forbidden: PermissionError | None = None
    held = False
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208 - as in identity: called for many
            for name in names:
                with suppress(FileNotFoundError, ProcessLookupError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in links:  # noqa: PTH115
                        held = True
                        yield pid
                        break
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError as error:
            forbidden = error
    if forbidden is not None and not held:
        raise forbidden


def every_pid() -> list[int]:
    """All pids of this namespace, as of now."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208

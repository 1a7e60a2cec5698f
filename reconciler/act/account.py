"""Whom a leader runs as, when that is not the daemon's own user."""

from __future__ import annotations

import os
import pwd

from msgspec import Struct

from reconciler.errors import ActError


class Account(Struct, frozen=True):
    """One user of this box, as the user database knows it at the moment of a start."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    """Every group it is in, `gid` included."""
    home: str
    shell: str


def find_account(name: str) -> Account:
    """The account of that name.

    Raises:
        ActError: there is none, or the user database cannot be asked.
    """
    try:
        entry = pwd.getpwnam(name)
        groups = tuple(os.getgrouplist(name, entry.pw_gid))
    except KeyError:
        raise ActError(f"there is no user {name!r} on this box any more", hint="correct `user:`") from None
    except OSError as error:
        raise ActError(f"user {name!r} cannot be looked up: {error.strerror}") from error
    return Account(name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, entry.pw_shell)

"""Files that decide what is run: read only where nobody but this user and root can have written or put them there."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from functools import lru_cache

MAX_BYTES = 1 << 20
"""Of any file that people write: set points of a thousand endpoints are a third of this."""
_MOST_LINKS = 8
_PAGE_BYTES = 4096


class UntrustedError(PermissionError):
    """Others than this user and root can have written it; `hint` says how to end that."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(errno.EPERM, reason)
        self.hint = hint


def read_trusted(path: str) -> bytes:
    """Content of a file that only this user or root can have written, or put there.

    1. The folder that it lies in is theirs, and others may not write to it, or it is sticky. Whoever may write to a
       folder may put an older version, or another of our files, in the place of the one that was meant.
    2. A link at the end of the path is theirs; where it leads is judged in the same way.
    3. The file is regular and theirs, and others may not write to it. A link, or a FIFO, is never waited for.

    At most one byte more than a file may have is read, so that an endless one ends.

    Raises:
        UntrustedError: others can have written it.
        OSError: it cannot be read, or is no regular file.
    """
    fd = _open(path, _MOST_LINKS)
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise OSError(errno.EISDIR, "is a folder")
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if problem := _whose(info) or writers(info, fd):  # 3
            raise UntrustedError(problem, f"it decides what is run here: {_cure(problem, path)}")
        return _content(fd, info.st_size)
    finally:
        os.close(fd)


def _content(fd: int, expected: int) -> bytes:
    """What a file holds. A file object would make room for `MAX_BYTES` each time, and this is asked at every look."""
    content = bytearray()
    while left := MAX_BYTES + 1 - len(content):
        part = os.read(fd, min(left, expected + _PAGE_BYTES))
        if not part:
            break
        content += part
    return bytes(content)


def check_folder(path: str) -> None:
    """Whether what lies in this folder can be told apart from what others put there.

    Raises:
        UntrustedError: it cannot.
        OSError: it is not there, or no folder.
    """
    os.close(_open_folder(path, ""))


def _open_folder(path: str, told: str) -> int:
    """The folder; `told` stands before what is wrong with it."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        # in a sticky folder others may add files, and not replace ours; what they add is seen to be theirs
        problem = _whose(info) or (None if info.st_mode & stat.S_ISVTX else writers(info, path))
    except BaseException:
        os.close(fd)
        raise
    if problem:
        os.close(fd)
        raise UntrustedError(f"{told}{problem}", f"what lies there is run: {_cure(problem, path)}")
    return fd


def _open(path: str, links: int) -> int:
    """The file at `path`; a descriptor is judged, never a path that may lead elsewhere a moment later."""
    folder, name = os.path.split(path)
    parent = _open_folder(folder or ".", f"lies in {folder or '.'}, which ")  # 1
    try:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=parent)
    except OSError as error:
        if error.errno != errno.ELOOP or links == 0:
            raise
        link = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if problem := _whose(link):  # 2
            reason = f"is a symbolic link that {problem}"
            raise UntrustedError(reason, "it decides what is run here: put the file itself there") from None
        return _open(os.path.join(folder, os.readlink(name, dir_fd=parent)), links - 1)  # noqa: PTH118 - as above, no Path
    finally:
        os.close(parent)


def _whose(info: os.stat_result) -> str | None:
    if info.st_uid in (0, os.geteuid()):
        return None
    return f"belongs to another user (uid {info.st_uid})"


def writers(info: os.stat_result, place: int | str) -> str | None:
    """Who may write besides the owner and root; None: nobody.

    A group may, if nobody else is in it: with the umask of 002 that goes with groups of one's own (Ubuntu's default),
    every file of a user is writable by a group that he alone is in.

    Args:
        info: of a file or folder.
        place: its descriptor, or its path, for its access control list.
    """
    if info.st_mode & stat.S_IWOTH:
        return "can be written by everybody"
    if not info.st_mode & stat.S_IWGRP:
        return None  # it bounds an access control list as well: nobody named there may write either
    if not _is_private(info.st_gid, _stamp("/etc/passwd"), _stamp("/etc/group")):
        return f"can be written by group {_group_name(info.st_gid)}"
    return "can be written by whom its access control list names" if _has_list(place) else None


@lru_cache(maxsize=16)
def _is_private(gid: int, *_stamps: int) -> bool:
    """Whether nobody but this user and root is in a group.

    It bears the name of one of them, the database names no other member, and it is no other user's own group. The name
    is asked for since network directories need not list whose own group it is. Asked once per change of the local
    files: their users cannot be counted at each look.
    """
    own = (0, os.geteuid())
    try:
        group = grp.getgrgid(gid)
        users = pwd.getpwall()
    except (KeyError, OSError):
        return False
    names = {user.pw_name for user in users if user.pw_uid in own}
    others = [user for user in users if user.pw_gid == gid and user.pw_uid not in own]
    return group.gr_name in names and names.issuperset(group.gr_mem) and not others


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 - per file per look
    except OSError:
        return 0


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OSError):
        return str(gid)


def _has_list(place: int | str) -> bool:
    """Whether an access control list stands beside the mode; its mask is then shown as the group's rights."""
    try:
        return bool(os.getxattr(place, "system.posix_acl_access"))
    except OSError:
        return False  # none, or a file system without


def _cure(problem: str, path: str) -> str:
    if problem.startswith("belongs"):
        return "let it belong to the user who runs reconciler, or to root"
    if "access control list" in problem:
        return f"setfacl -b {path}"
    return f"chmod {'g-w' if 'group' in problem else 'o-w'} {path}"

"""The files themselves: found, checked for who may write them, read, decoded. The one part of this room with I/O."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reconciler.errors import Problem, SpecError
from reconciler.spec.document import MAX_BYTES, decode, parse
from reconciler.spec.endpoints import absolute
from reconciler.spec.tree import Scalar, child

SUFFIXES = (".yaml", ".yml")
DEFAULT_OVERLAYS = "overlays/"


@dataclass(frozen=True, slots=True, order=True)
class SourceText:
    """One file: where it is, as messages name it, and what it says."""

    path: str
    text: str

    @property
    def name(self) -> str:
        """The stem: the name of an overlay."""
        return Path(self.path).stem


@dataclass(frozen=True, slots=True)
class Texts:
    """Everything people wrote, as read at one moment."""

    setpoints: SourceText
    overlays: tuple[SourceText, ...] | None
    """Sorted by path. None: the folder is not there, or cannot be listed; which is not the same as empty."""
    overlays_folder: Path
    problems: tuple[Problem, ...] = ()
    """Overlay files that are there and cannot be read."""


def read_texts(path: str | Path) -> Texts:
    """Read the set points and the overlays beside them.

    Raises:
        SpecError: the set points cannot be read (what they say is not judged here).
    """
    try:
        content = read_trusted(str(path))
    except OSError as error:
        hint = "name the file with --setpoints" if error.errno == errno.ENOENT else _ACCESS_HINTS.get(error.errno or 0)
        raise SpecError((Problem(str(path), 0, 0, _reason(error), hint),)) from None
    setpoints = SourceText(str(path), decode(content, str(path)))
    folder = _overlays_folder(setpoints)
    problems: list[Problem] = []
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if _is_overlay(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return Texts(setpoints, None, folder)
    except OSError as error:
        return Texts(setpoints, None, folder, (Problem(str(folder), 0, 0, _reason(error)),))
    overlays: list[SourceText] = []
    for name in names:
        file = str(folder / name)
        try:
            overlays.append(SourceText(file, decode(read_trusted(file), file)))
        except FileNotFoundError:
            continue  # gone between the listing and the reading, or a link to nowhere
        except OSError as error:
            problems.append(Problem(file, 0, 0, _reason(error), _ACCESS_HINTS.get(error.errno or 0)))
        except SpecError as error:
            problems.extend(error.problems)
    return Texts(setpoints, tuple(overlays), folder, tuple(problems))


def read_trusted(path: str) -> bytes:
    """Content of a file that only its owner (this user or root) and their group can have written.

    At most one byte more than a file may have is read, so that an endless one ends.

    Raises:
        OSError: it cannot be read, is no regular file, or others may write it.
    """
    # O_NONBLOCK: a FIFO of that name must not hang the daemon; the descriptor is judged, not the path
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EISDIR, "is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, f"belongs to another user (uid {status.st_uid})")
        if status.st_mode & stat.S_IWOTH:
            raise OSError(errno.EACCES, "can be written by everybody")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(MAX_BYTES + 1)
    finally:
        os.close(fd)


_ACCESS_HINTS = {
    errno.EPERM: "it decides what is run here: let it belong to the user who runs reconciler, or to root",
    errno.EACCES: "it decides what is run here: chmod o-w, and let this user read it",
}


@lru_cache(maxsize=4)  # asked at every look of a daemon, and answered by parsing the whole file
def _overlays_folder(setpoints: SourceText) -> Path:
    """The folder that the set points name; the default while they cannot be read."""
    name = DEFAULT_OVERLAYS
    try:
        node = child(parse(setpoints.text, setpoints.path), "overlays")
    except SpecError:
        node = None
    if isinstance(node, Scalar) and isinstance(node.value, str) and node.value.strip():
        name = node.value
        return Path(absolute(name, node.at)) if name.startswith("~") else Path(setpoints.path).parent / name
    return Path(setpoints.path).parent / name


def _is_overlay(name: str) -> bool:
    """Editors leave dot files, `#x#` and `x~` behind; `x.yaml.example` is a disabled one."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "#"))


def _reason(error: OSError) -> str:
    reason = error.strerror or "cannot be read"
    return reason.lower() if error.errno == errno.ENOENT else reason

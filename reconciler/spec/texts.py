"""The files themselves: found, read, decoded. Who may have written them, `trust` says."""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

from reconciler.errors import Problem, SpecError
from reconciler.spec.document import decode, parse
from reconciler.spec.endpoints import absolute
from reconciler.spec.tree import Scalar, child
from reconciler.spec.trust import UntrustedError, check_folder, read_trusted

SUFFIXES = (".yaml", ".yml")
DEFAULT_OVERLAYS = "overlays/"


class SourceText(Struct, frozen=True, order=True):
    """One file: where it is, as messages name it, and what it says."""

    path: str
    text: str

    @property
    def name(self) -> str:
        """The stem: the name of an overlay."""
        return Path(self.path).stem


class Texts(Struct, frozen=True):
    """Everything people wrote, as read at one moment."""

    setpoints: SourceText
    overlays: tuple[SourceText, ...] | None
    """Sorted by path. None: the folder is not there, cannot be listed, or others may write to it; which is not the same
    as empty."""
    overlays_folder: Path
    problems: tuple[Problem, ...] = ()
    """Overlay files that are there and cannot be read, or why their folder is not."""


def read_texts(path: str | Path) -> Texts:
    """Read the set points and the overlays beside them.

    Raises:
        SpecError: the set points cannot be read (what they say is not judged here).
    """
    setpoints = read_source(path)
    folder = _overlays_folder(setpoints)
    problems: list[Problem] = []
    try:
        check_folder(str(folder))
        names = sorted(entry.name for entry in os.scandir(folder) if _is_overlay(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return Texts(setpoints, None, folder)
    except OSError as error:
        return Texts(setpoints, None, folder, (_unread(str(folder), error),))
    overlays: list[SourceText] = []
    for name in names:
        file = str(folder / name)
        try:
            overlays.append(_read(file))
        except FileNotFoundError:
            continue  # gone between the listing and the reading, or a link to nowhere
        except OSError as error:
            problems.append(_unread(file, error))
        except SpecError as error:
            problems.extend(error.problems)
    return Texts(setpoints, tuple(overlays), folder, tuple(problems))


def read_source(path: str | Path) -> SourceText:
    """One file of set points, or one overlay.

    Raises:
        SpecError: it cannot be read, or is no text (what it says is not judged here).
    """
    try:
        return _read(str(path))
    except OSError as error:
        raise SpecError((_unread(str(path), error),)) from None


def _read(path: str) -> SourceText:
    return SourceText(path, decode(read_trusted(path), path))


def _unread(path: str, error: OSError) -> Problem:
    hint = error.hint if isinstance(error, UntrustedError) else _HINTS.get(error.errno or 0)
    return Problem(path, 0, 0, _reason(error), hint)


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


_HINTS = {
    errno.ENOENT: "is that its name? set points are named with --setpoints",
    errno.EACCES: "it decides what is run here: let this user read it",
}


def _is_overlay(name: str) -> bool:
    """Editors leave dot files, `#x#` and `x~` behind; `x.yaml.example` is a disabled one."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "#"))


def _reason(error: OSError) -> str:
    reason = error.strerror or "cannot be read"
    return reason.lower() if error.errno == errno.ENOENT else reason

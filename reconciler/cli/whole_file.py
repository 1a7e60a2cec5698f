"""Files that commands write beside what people write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str, mode: int) -> None:
    """Put `text` at `path` so that a reader finds all of it, or what was there before.

    The draft is private until it is complete, whatever the umask, and new: a link that somebody left under its name is
    not written through.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    fd, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(fd, mode)
        Path(draft).rename(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise

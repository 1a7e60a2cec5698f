"""Files as careful editors write them."""

from __future__ import annotations

from pathlib import Path


def put(path: Path, text: str) -> Path:
    """In one step, whoever looks at that moment, and readable by everybody whatever the umask."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text)
    draft.chmod(0o644)
    return draft.rename(path)

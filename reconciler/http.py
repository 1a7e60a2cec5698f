"""httpx without its command line: click, rich and pygments, 45 ms and 5 MiB that no daemon has a use for."""

from __future__ import annotations

import sys

sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type] # as if click were not installed

import httpx  # noqa: E402

__all__ = ["httpx"]

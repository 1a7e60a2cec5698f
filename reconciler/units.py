"""Bytes, durations, counts, years: parsing what people write, printing what they read. Conversion is done here only."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", re.ASCII)
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])", re.ASCII)
_ISO_DURATION = re.compile(
    r"P(?:(\d+)W)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?", re.ASCII | re.IGNORECASE
)
_MAX_SECONDS = 100 * 366 * 86400.0  # a century: beyond it is a typing error, and float arithmetic stays exact

FIRST_YEAR, LAST_YEAR = 1971, 2199
"""Of moments to plan for: all that is reckoned from them has a date in every time zone, too."""

DURATION_HELP = "units are ms, s, m, h, d, w: 30s, 5m, 2h, 1d12h (or ISO 8601: PT5M)"
SIZE_HELP = "units are KiB, MiB, GiB, TiB, KB, MB, GB, TB: 20GiB, 512MiB"


def parse_duration(text: str) -> float:
    """Seconds in `30s`, `5m`, `2h`, `1d12h`, `1.5h` or ISO 8601 (`PT5M`).

    Raises:
        ValueError: not a duration; the message names the units.
    """
    stripped = text.strip()
    seconds: float | None = None
    if _DURATION.fullmatch(stripped):
        seconds = sum(float(n) * _DURATION_UNITS[u] for n, u in _DURATION_PART.findall(stripped))
    elif (iso := _ISO_DURATION.fullmatch(stripped)) and any(iso.groups()):
        factors = (604800.0, 86400.0, 3600.0, 60.0, 1.0)
        seconds = sum(float(g) * f for g, f in zip(iso.groups(), factors, strict=True) if g)
    if seconds is None:
        raise ValueError(f"{text!r} is not a duration; {DURATION_HELP}")
    if seconds > _MAX_SECONDS:
        raise ValueError(f"{text!r} is longer than a century")
    return seconds


def parse_size(text: str) -> int:
    """Bytes in `20GiB`, `20GB`, `512MiB`.

    Raises:
        ValueError: not a size; the message names the units.
    """
    match = _SIZE.fullmatch(text)
    factor = _SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; {SIZE_HELP}")
    return int(float(match[1]) * factor)


def format_duration(seconds: float) -> str:
    """The two largest units: `45s`, `5m`, `2h30m`, `1d12h`; below 10 s with one decimal."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 10 and seconds != int(seconds):
        return f"{seconds:.1f}s"
    whole = round(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def format_size(size_bytes: int) -> str:
    """`20GiB`, `1.5GiB`, `512MiB`, `0B`: binary units, at most one decimal."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f}".removesuffix(".0") + unit
    return f"{size_bytes}B"


def to_mib(size_bytes: int) -> int:
    """Whole MiB, rounded down, as NVML's own tools print."""
    return size_bytes // MIB


def counted(count: int, what: str, many: str | None = None) -> str:
    """`1 file`, `2 files`, `0 files`; `many` where an `s` does not do."""
    return f"{count} {what if count == 1 else many or what + 's'}"

"""A forecast for people: as text, as an SVG picture, and as JSON data. Pure, like the forecast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta, tzinfo
from html import escape
from string import ascii_lowercase, ascii_uppercase

from reconciler.plan.forecast import Bar, Forecast, Outage
from reconciler.units import format_duration

_MARKS = {"loading": "+", "leaving": "-", "asleep": "~", "unhealthy": "!", "foreign": "#"}
_TICKS_S = (300, 900, 1800, 3600, 2 * 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 7 * 86400)
_FILLS = {
    "ready": 1.0, "running": 1.0, "reserved": 0.55, "loading": 0.35, "leaving": 0.35, "asleep": 0.2, "unhealthy": 0.35,
    "foreign": 0.6,
}  # fmt: skip
_COLOURS = {
    "endpoint": ("#aec7e8", "#98df8a", "#c5b0d5", "#9edae5", "#c49c94", "#dbdb8d", "#ffbb78", "#f7b6d2"),
    "overlay": ("#5b8fc4", "#f28e2b", "#6ab35f", "#d07ab0", "#e0b400", "#58b5ad"),
}
"""Of each kind its own, all of them light enough for black letters."""
_MARK_COLOURS = {"evict": "#e15759", "back": "#2e7d32"}
_LANE, _LEFT, _TOP, _WIDE = 22, 90, 56, 1000
_LETTER = 7.2
"""Pixels that a letter of a label takes at most, on average."""


def lanes(forecast: Forecast) -> Iterator[tuple[int, list[Bar]]]:
    """GPU index → the bars of one row; a GPU has as many rows as it has had tenants at a time, and at least one."""
    for index, uuid, _ in forecast.gpus:
        rows: list[list[Bar]] = [[]]
        homes: dict[tuple[str, str], list[Bar]] = {}
        for bar in sorted((b for b in forecast.bars if b.gpu == uuid), key=lambda b: (b.begin, b.kind, b.name)):
            home = homes.get((bar.kind, bar.name))
            row = next((r for r in ([home] if home else []) + rows if not r or r[-1].end <= bar.begin), None)
            if row is None:
                rows.append(row := [])
            row.append(bar)
            homes[bar.kind, bar.name] = row
        for found in rows:
            yield index, found


def letters(forecast: Forecast) -> Mapping[tuple[str, str], str]:
    """A letter for each endpoint (small) and each overlay (capital); `*` for those beyond the alphabet."""
    found: dict[tuple[str, str], str] = {}
    for kind, alphabet in (("endpoint", ascii_lowercase), ("overlay", ascii_uppercase)):
        names = sorted({b.name for b in forecast.bars if b.kind == kind})
        found |= {(kind, name): alphabet[i] if i < len(alphabet) else "*" for i, name in enumerate(names)}
    return found


def render_forecast(forecast: Forecast, zone: tzinfo, *, width: int = 72) -> str:
    """As text, without a final newline.

    In this order: the GPUs over time, a column a step, whoever has most of a step in it; what the letters mean; what
    happens when; for how long each endpoint is away; what still waits at the end.
    """
    span = max(1e-9, forecast.end - forecast.begin)
    step, known = span / width, letters(forecast)
    head = f"{_day(forecast.begin, zone)} to {_day(forecast.end, zone)}, a column is {format_duration(round(step))}"
    lines = [f"Forecast from {head}", "", " " * 8 + _axis(forecast, zone, width)]
    blank = {index: "." if state == "ok" else "x" for index, _, state in forecast.gpus}
    for index, row in lanes(forecast):
        cells = (_cell(forecast, row, known, n, step) or blank[index] for n in range(width))
        lines.append(f"GPU {index:<3} " + "".join(cells))
    legend = [f"  {letter} {name}" for (_, name), letter in known.items()]
    marks = "  + loads   - leaves   ~ sleeps   ! unhealthy   # not ours   . free"
    marks += "   x cannot be used" if any(state != "ok" for _, _, state in forecast.gpus) else ""
    parts = [lines, [*legend, marks]]
    parts.append([f"{_day(m.at, zone)}  {m.subject} {m.message}" for m in forecast.moments])
    parts.append(list(_outage_lines(forecast.outages, zone)))
    parts.append([f"x {b.subject}  still waits at the end: {b.reason}: {b.message}" for b in forecast.waiting])
    if not forecast.complete:
        end = _day(forecast.end, zone)
        parts.append([f"There is more to decide than could be looked at: nothing is told after {end}."])
    return "\n\n".join("\n".join(part) for part in parts if part)


def _cell(forecast: Forecast, row: Iterable[Bar], known: Mapping[tuple[str, str], str], n: int, step: float) -> str:
    begin = forecast.begin + n * step
    best, most = "", 0.0
    for bar in row:
        shared = min(bar.end, begin + step) - max(bar.begin, begin)
        if shared > most:
            best, most = _MARKS.get(bar.phase) or known.get((bar.kind, bar.name), "*"), shared
    return best


def _axis(forecast: Forecast, zone: tzinfo, width: int) -> str:
    cells = [" "] * (width + 6)
    free = 0
    for moment, label in _ticks(forecast, zone, width // 8):
        at = int((moment - forecast.begin) / (forecast.end - forecast.begin) * width)
        if at >= free:
            cells[at : at + len(label)] = label
            free = at + len(label) + 1
    return "".join(cells).rstrip()


def _ticks(forecast: Forecast, zone: tzinfo, most: int) -> Iterator[tuple[float, str]]:
    """Round moments of the local day, at most so many, and how they are called."""
    span = forecast.end - forecast.begin
    step = next((s for s in _TICKS_S if span / s <= most), _TICKS_S[-1])
    first = datetime.fromtimestamp(forecast.begin, zone)
    moment = first.replace(hour=0, minute=0, second=0, microsecond=0)
    while (wall := moment.timestamp()) < forecast.end:
        exists = datetime.fromtimestamp(wall, zone).hour == moment.hour  # clocks may be set forward over it
        if wall >= forecast.begin and exists:
            yield wall, moment.strftime("%H:%M" if moment.hour or moment.minute else "%d.%m.")
        moment += timedelta(seconds=step)  # of the local clock: ticks stay on round hours over a DST change


def _outage_lines(outages: Iterable[Outage], zone: tzinfo) -> Iterator[str]:
    by_name: dict[str, list[Outage]] = {}
    for outage in outages:
        by_name.setdefault(outage.endpoint, []).append(outage)
    for name, found in by_name.items():
        total = format_duration(round(sum(o.end - o.begin for o in found)))
        yield f"{name} does not answer for {total}:"
        for one in found:
            until = "and past the end" if one.lasts else f"to {_day(one.end, zone)}"
            why = f", for {one.overlay}" if one.overlay else ""
            yield f"  {_day(one.begin, zone)} {until} ({format_duration(round(one.end - one.begin))}{why})"


def _day(wall: float, zone: tzinfo) -> str:
    return datetime.fromtimestamp(wall, zone).strftime("%Y-%m-%d %H:%M:%S")


# ---------------------------------------------------------------- a picture


def draw_forecast(forecast: Forecast, zone: tzinfo) -> str:
    """As an SVG document: a row per GPU and tenant, evictions and returns as marks, and who does not answer below."""
    rows = list(lanes(forecast))
    colours = _colours(forecast)
    height_lanes = _TOP + _LANE * len(rows)
    legend, height_legend = _legend(colours, height_lanes + 14)
    outages = list(_outage_lines(forecast.outages, zone))
    height = height_legend + 30 + 16 * len(outages)
    unusable = {index: state for index, _, state in forecast.gpus if state != "ok"}
    size = f'width="{_LEFT + _WIDE + 20}" height="{height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f"<title>Forecast from {_day(forecast.begin, zone)} to {_day(forecast.end, zone)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{_day(forecast.begin, zone)} to {_day(forecast.end, zone)}</text>',
    ]
    for moment, label in _ticks(forecast, zone, 14):
        x = _x(forecast, moment)
        out.append(f'<line x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{height_lanes}" stroke="#ddd"/>')
        out.append(f'<text x="{x}" y="{_TOP - 10}" text-anchor="middle" fill="#666">{label}</text>')
    last = None
    for number, (index, row) in enumerate(rows):
        y = _TOP + number * _LANE
        if index != last:
            out.append(f'<text x="8" y="{y + 15}">GPU {index}</text>')
            if index in unusable:
                out.append(f'<text x="{_LEFT + 4}" y="{y + 15}" fill="#b00020">{unusable[index]}</text>')
            out.append(f'<line x1="0" y1="{y}" x2="{_LEFT + _WIDE}" y2="{y}" stroke="#bbb"/>')
            last = index
        out += [_drawn(forecast, bar, colours, y, zone) for bar in row]
    for mark in forecast.moments:
        if mark.kind in ("evict", "back"):
            x, colour = _x(forecast, mark.at), _MARK_COLOURS[mark.kind]
            told = escape(f"{_day(mark.at, zone)} {mark.subject} {mark.message}")
            shape = f'd="{_triangle(x, _TOP - 6)}" fill="{colour}"'
            out.append(f'<path class="{mark.kind}" {shape}><title>{told}</title></path>')
            ends = f'x1="{x}" y1="{_TOP}" x2="{x}" y2="{height_lanes}"'
            out.append(f'<line {ends} stroke="{colour}" stroke-opacity="0.5" stroke-dasharray="2 3"/>')
    out += legend
    for number, line in enumerate(outages):
        indent = 20 if line.startswith(" ") else 8
        out.append(f'<text x="{indent}" y="{height_legend + 20 + 16 * number}">{escape(line.strip())}</text>')
    return "\n".join([*out, "</svg>", ""])


def _colours(forecast: Forecast) -> Mapping[tuple[str, str], str]:
    """The colour of each endpoint and each overlay; of more than there are colours some have the same."""
    found: dict[tuple[str, str], str] = {}
    for kind, palette in _COLOURS.items():
        names = sorted({b.name for b in forecast.bars if b.kind == kind})
        found |= {(kind, name): palette[n % len(palette)] for n, name in enumerate(names)}
    return found


def _legend(colours: Mapping[tuple[str, str], str], top: int) -> tuple[list[str], int]:
    """Whose colour is which, in rows from `top` on, and where it ends: many a bar is too short for its name."""
    out: list[str] = []
    x, y = 8.0, top
    for (kind, name), colour in colours.items():
        wide = 20 + len(name) * _LETTER + 16
        if x > 8 and x + wide > _LEFT + _WIDE:
            x, y = 8.0, y + 20
        out.append(f'<rect x="{x:.1f}" y="{y}" width="14" height="12" fill="{colour}"{_edge(kind)}/>')
        out.append(f'<text x="{x + 20:.1f}" y="{y + 11}">{escape(name)}</text>')
        x += wide
    y += 20
    for x, kind, told in ((8, "evict", "somebody gives way"), (180, "back", "somebody is back")):
        out.append(f'<path d="{_triangle(x + 7, y + 3)}" fill="{_MARK_COLOURS[kind]}"/>')
        out.append(f'<text x="{x + 20}" y="{y + 11}">{told}</text>')
    out.append(f'<text x="360" y="{y + 11}">pale: loads, leaves or sleeps</text>')
    return out, y + 20


def _triangle(x: float, y: float) -> str:
    return f"M{x - 4:.1f} {y}h8l-4 7z"


def _edge(kind: str) -> str:
    return ' stroke="#222"' if kind == "overlay" else ""


def _drawn(forecast: Forecast, bar: Bar, colours: Mapping[tuple[str, str], str], y: int, zone: tzinfo) -> str:
    x, end = _x(forecast, bar.begin), _x(forecast, bar.end)
    wide = max(1.0, round(end - x, 1))
    colour = colours.get((bar.kind, bar.name), "#999999")
    told = escape(f"{bar.name}: {bar.phase}, {_day(bar.begin, zone)} to {_day(bar.end, zone)}")
    rect = (
        f'<rect class="{bar.kind} {bar.phase}" x="{x}" y="{y + 2}" width="{wide}" height="{_LANE - 4}" fill="{colour}" '
        f'fill-opacity="{_FILLS[bar.phase]}"{_edge(bar.kind)}><title>{told}</title></rect>'
    )
    label = _label(bar.name, wide) if bar.phase in ("ready", "running", "reserved", "foreign") else ""
    if not label:
        return rect
    return f'{rect}\n<text x="{x + 4}" y="{y + 15}" fill="#111" pointer-events="none">{escape(label)}</text>'


def _label(name: str, wide: float) -> str:
    """As much of a name as a bar has room for; nothing where that would be a letter or two."""
    room = int((wide - 8) / _LETTER)
    if len(name) <= room:
        return name
    return f"{name[: room - 1]}…" if room >= 5 else ""


def _x(forecast: Forecast, wall: float) -> float:
    return round(_LEFT + (wall - forecast.begin) / max(1e-9, forecast.end - forecast.begin) * _WIDE, 1)


# ---------------------------------------------------------------- JSON


def forecast_data(forecast: Forecast) -> dict[str, object]:
    """As the `data` of a JSON answer: moments are ISO 8601 in UTC, durations seconds, GPUs indices."""
    from reconciler.plan.status import iso

    indices = {uuid: index for index, uuid, _ in forecast.gpus}
    return {
        "from": iso(forecast.begin),
        "to": iso(forecast.end),
        "complete": forecast.complete,
        "decisions": forecast.decisions,
        "gpus": [{"index": index, "uuid": uuid, "state": state} for index, uuid, state in forecast.gpus],
        "bars": [
            {
                "gpu": indices[b.gpu], "name": b.name, "kind": b.kind, "phase": b.phase,
                "from": iso(b.begin), "to": iso(b.end),
            }
            for b in forecast.bars
        ],
        "moments": [
            {"time": iso(m.at), "kind": m.kind, "subject": m.subject, "message": m.message} for m in forecast.moments
        ],
        "outages": [
            {
                "endpoint": o.endpoint, "from": iso(o.begin), "to": iso(o.end), "overlay": o.overlay, "lasts": o.lasts,
                "seconds": round(o.end - o.begin, 3),
            }
            for o in forecast.outages
        ],
        "waiting": [{"subject": str(b.subject), "reason": b.reason, "message": b.message} for b in forecast.waiting],
    }  # fmt: skip

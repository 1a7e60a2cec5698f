"""When an overlay runs: moments in a time zone, cron expressions, and the rules between them."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from reconciler.errors import suggest
from reconciler.spec.findings import Findings, clip
from reconciler.spec.overlay_models import MakespanModel
from reconciler.spec.spec import Makespan, Source
from reconciler.spec.tree import Map, Node, child, locate
from reconciler.spec.values import epoch
from reconciler.units import counted

LEAST_GRACE_S = 60.0
GRACE_SHARE = 0.1
_SOME_DAY = datetime(2026, 1, 1, tzinfo=UTC)
_LONGEST_SCHEDULE = 200


def resolve_makespan(model: MakespanModel, node: Node, findings: Findings) -> Makespan:
    """The makespan with its moments as epoch seconds; what is wrong goes to `findings`.

    Args:
        model: the validated fields.
        node: their text, the mapping below `makespan`.
        findings: where problems go.
    """

    def at(*keys: str) -> Source:
        return next((locate(node, (key,)) for key in keys if child(node, key) is not None), node.at)

    zone = _zone(model.timezone, at("timezone"), findings)
    start = _moment(model.start, zone, at("start"), model, findings)
    deadline = _moment(model.deadline, zone, at("deadline"), model, findings)
    if model.duration is None and model.deadline is None:
        hint = "write `duration: 20m`, or `deadline:` with a time"
        findings.add(_whole(node), "the makespan has neither duration nor deadline", hint)
    if start is not None and deadline is not None and deadline <= start:
        findings.add(at("deadline"), "the deadline is not after the start")
    if model.schedule is not None:
        _check_schedule(model, node, findings)
    grace = model.grace
    if grace is None:
        grace = max(LEAST_GRACE_S, GRACE_SHARE * (model.duration or 0.0))
    return Makespan(
        start=start,
        duration_s=model.duration,
        grace_s=grace,
        on_overrun=model.on_overrun,
        deadline=deadline,
        schedule=" ".join(model.schedule.split()) if model.schedule else None,
        timezone=model.timezone,
        starting_deadline_s=model.starting_deadline,
    )


def _check_schedule(model: MakespanModel, node: Node, findings: Findings) -> None:
    where = locate(node, ("schedule",))
    if model.start is not None:
        findings.add(
            where, "start and schedule exclude each other", "keep start for once, schedule for again and again"
        )
    if model.deadline is not None:
        hint = "bound each run with `duration` and `on_overrun: stop`"
        findings.add(locate(node, ("deadline",)), "a deadline is one moment, and a schedule has many", hint)
    if model.timezone is None:
        findings.add(where, "a schedule needs a time zone", "write `timezone: Europe/Berlin`")
    if reason := _schedule_problem(model.schedule or ""):
        hint = 'five fields: minute hour day month weekday, such as "0 22 * * 1-5"'
        findings.add(where, f'"{clip(model.schedule or "")}" is not a schedule: {reason}', hint)


def _schedule_problem(text: str) -> str | None:
    if len(text) > _LONGEST_SCHEDULE:
        return "too long"
    if len(text.split()) != 5:
        return counted(len(text.split()), "field")
    try:
        next(CronSim(text, _SOME_DAY))
    except StopIteration:
        return "it never comes"
    except CronSimError as error:
        return str(error).lower()
    except (AssertionError, ValueError, TypeError, IndexError):  # odd mixtures such as `L/2`
        return "not understood"
    return None


def _zone(name: str | None, at: Source, findings: Findings) -> tzinfo | None:
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (OSError, KeyError, ValueError):  # not there; a folder of zones; not a key at all
        findings.add(at, f'unknown time zone "{clip(name)}"', _suggest_zone(name))
        return None


def _suggest_zone(name: str) -> str:
    zones = available_timezones()
    city = {zone.rpartition("/")[2].lower(): zone for zone in sorted(zones)}.get(name.replace(" ", "_").lower())
    hint = f'did you mean "{city}"?' if city else suggest(name, zones) or ""
    return hint if hint.startswith("did") else "write an IANA name such as Europe/Berlin"


def _moment(
    moment: datetime | None, zone: tzinfo | None, at: Source, model: MakespanModel, findings: Findings
) -> float | None:
    """Epoch seconds; a time without an offset is read in `zone`, the first of two where clocks are set back."""
    if moment is None or moment.tzinfo is not None:
        return None if moment is None else epoch(moment)
    if zone is None:
        if model.timezone is None:
            hint = "add an offset such as +01:00, or `timezone: Europe/Berlin`"
            findings.add(at, f"{moment.isoformat(' ')} has no time zone", hint)
        return None
    local = moment.replace(tzinfo=zone)
    seconds = epoch(local)
    if datetime.fromtimestamp(seconds, zone).replace(tzinfo=None) != moment:
        message = f"{moment.isoformat(' ')} does not exist in {model.timezone}: clocks are set forward over it"
        findings.add(at, message, "write the time before or after the gap")
        return None
    return seconds


def _whole(node: Node) -> Source:
    if isinstance(node, Map) and node.entries:
        return next(iter(node.entries.values())).key_at
    return node.at

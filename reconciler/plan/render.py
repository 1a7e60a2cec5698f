"""A plan in words and as JSON data. Pure: no colour, no width, no clock, no local time zone but the one it is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, tzinfo

from reconciler.plan.actions import WAITS, Action, Blocked, Cause, Change, Drift, Plan, Verdict
from reconciler.plan.observed import Observed
from reconciler.plan.why import tell
from reconciler.units import format_duration

NO_CHANGES = "No changes. The box matches its set points."

_COUNTED = (("+", "start"), ("-", "stop"), ("!", "evict"), ("<", "restore"), ("~", "change"))
_ALWAYS_SHOWN = ("+", "!", "<")


def gpu_indices(observed: Observed) -> dict[str, int]:
    """UUID → index: people read and write indices."""
    return {gpu.uuid: gpu.index for gpu in observed.gpus}


def render_plan(plan: Plan, indices: Mapping[str, int], zone: tzinfo = UTC) -> str:
    """A plan as text, without a final newline.

    In this order, each part only if there is something to say: what changes (`symbol subject  reason  [cause]`), one
    line per action (`[needs] -> #id subject, op, cause, predicted begin and end`), budgets, why these victims, and one
    line that counts.

    Args:
        plan: the plan
        indices: GPU UUID → index (`gpu_indices`); a UUID that is not in it is shown as it is
        zone: time zone of the wall-clock times shown
    """
    if not plan.changes and not plan.actions and not plan.blocked and not plan.drift:
        return NO_CHANGES
    subjects = [c.subject for c in plan.changes] + [d.subject for d in _undone(plan)]
    width = max((len(s.name) for s in subjects), default=0)
    parts = [
        [*_change_lines(plan, width, zone), *_undone_lines(plan, width)],
        [_action_line(a, plan.now.wall, indices) for a in plan.actions],
        [f"Budget: {line}" for line in plan.budgets],
        _victims_lines(plan),
        [f"Note: {note}" for note in plan.notes],
        [_summary(plan)],
    ]
    return in_zone("\n\n".join("\n".join(lines) for lines in parts if lines), zone)


def in_zone(text: str, zone: tzinfo) -> str:
    """A text with the moments that the planner wrote into it, in UTC, as this time zone shows them."""
    if zone is UTC:
        return text

    def local(found: re.Match[str]) -> str:
        moment = datetime.strptime(found[0], "%Y-%m-%d %H:%M:%SZ").replace(tzinfo=UTC)
        return moment.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S")

    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", local, text)


def _change_lines(plan: Plan, width: int, zone: tzinfo) -> list[str]:
    waits = {b.subject: b for b in plan.blocked}
    lines = []
    for change in plan.changes:
        line = f"{change.symbol} {change.subject.name:<{width}}  {change.reason}  [{_cause(change.cause)}]"
        if change.expected_back is not None:
            word = "back" if change.actions else "not before"
            line += f"  ({word} {_moment(change.expected_back, plan.now.wall, zone)})"
        lines.append(line)
        blocked = waits.pop(change.subject, None)
        if blocked is not None:
            lines += _blocked_lines(change, blocked)
    return lines


def _undone(plan: Plan) -> list[Drift]:
    """What is not as it should be and nothing is done about: given up, not to be told, or not worth worrying about."""
    told = {c.subject for c in plan.changes} | {a.subject for a in plan.actions}
    return [drift for drift in plan.drift if drift.subject not in told]


def _undone_lines(plan: Plan, width: int) -> list[str]:
    lines = []
    for drift in _undone(plan):
        name, failed = drift.subject.name, drift.observed == "failed"
        reason = plan.endpoints[name].reason
        why = f": {reason}" if reason else ""
        lines.append(f"{'x' if failed else '?'} {name:<{width}}  should be {drift.expected}, is {drift.observed}{why}")
        if failed:
            lines.append(f"    hint: edit it, or `reconciler reset {name}`")
    return lines


def _blocked_lines(change: Change, blocked: Blocked) -> list[str]:
    """What the row of a blocked subject does not say yet: the reason, where there are actions, and what would help.

    That an endpoint is displaced needs no line of its own beside its eviction or its return.
    """
    if change.actions and blocked.reason == "EvictedBy":
        return []
    lines = [f"    waits: {blocked.reason}: {blocked.message}"] if change.actions else []
    return [*lines, *(f"    hint: {hint}" for hint in blocked.alternatives)]


def _action_line(action: Action, now: float, indices: Mapping[str, int]) -> str:
    needs = "[" + ",".join(map(str, action.needs)) + "]"
    where = f" on {_gpus(action.gpus, indices)}" if action.gpus else ""
    begin, end = (format_duration(moment - now) for moment in action.expected)
    return f"{needs} -> #{action.id} {action.subject}, {action.op}{where}, {_cause(action.cause)}, +{begin} to +{end}"


def _cause(cause: Cause) -> str:
    """`evict render, overlays/render.yaml:1`."""
    words = cause.kind + (f" {cause.overlay}" if cause.overlay else "") + (f" ({cause.detail})" if cause.detail else "")
    return f"{words}, {cause.source}" if cause.source else words


def _gpus(gpus: Iterable[str], indices: Mapping[str, int]) -> str:
    """`GPU 0-3`, `GPU 0,2`; runs of three and more are drawn together."""
    known = sorted(indices[g] for g in gpus if g in indices)
    runs: list[list[int]] = []
    for index in known:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = [
        word for run in runs for word in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(index) for index in run])
    ]
    return "GPU " + ",".join([*words, *sorted(g for g in gpus if g not in indices)])


def _moment(wall: float, now: float, zone: tzinfo) -> str:
    local, today = datetime.fromtimestamp(wall, zone), datetime.fromtimestamp(now, zone).date()
    clock = local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")
    return f"~{clock}, in {format_duration(max(0.0, round(wall - now)))}"


def _victims_lines(plan: Plan) -> list[str]:
    lines = []
    for verdict in plan.verdicts:
        first, *more = tell(verdict)
        who = " and ".join(word for word, some in (("victims", verdict.victims), ("moves", verdict.moves)) if some)
        lines += [f"Why these {who}: {first}", *(f"    {sentence}" for sentence in more)]
    return lines


def _summary(plan: Plan) -> str:
    counts = {symbol: 0 for symbol, _ in _COUNTED}
    blocked, to_come = sum(drift.observed == "failed" for drift in _undone(plan)), 0
    waiting = {b.subject for b in plan.blocked if b.reason == "NotYet"}
    for change in plan.changes:
        if not change.actions and change.subject in waiting:
            to_come += 1
        elif change.symbol not in counts:
            blocked += 1
        elif any(plan.actions[i - 1].op not in WAITS for i in change.actions):
            counts[change.symbol] += 1
    words = [f"{counts[s]} to {word}" for s, word in _COUNTED if counts[s] or s in _ALWAYS_SHOWN]
    words += [f"{blocked} blocked"] + ([f"{to_come} to come"] if to_come else [])
    summary = f"Plan: {', '.join(words)}."
    return f"{summary} Nothing to do now." if plan.converged else summary


# ---------------------------------------------------------------- JSON


def plan_data(plan: Plan, observed: Observed) -> dict[str, object]:
    """A plan as the `data` of its JSON answer.

    Moments are ISO 8601 in UTC, durations seconds, GPUs indices in NVML order (a UUID where the index is not known),
    subjects and causes texts.
    """
    indices = gpu_indices(observed)
    return {
        "spec_hash": plan.spec_hash,
        "observed_fingerprint": plan.observed_fingerprint,
        "now": _iso(plan.now.wall),
        "converged": plan.converged,
        "drift": [{"subject": str(d.subject), "expected": d.expected, "observed": d.observed} for d in plan.drift],
        "changes": [_change_data(c) for c in plan.changes],
        "actions": [_action_data(a, indices) for a in plan.actions],
        "blocked": [blocked_data(b) for b in plan.blocked],
        "budgets": list(plan.budgets),
        "objective": dict(plan.objective),
        "proof": plan.proof,
        "verdicts": [_verdict_data(v) for v in plan.verdicts],
        "notes": list(plan.notes),
    }


def _change_data(change: Change) -> dict[str, object]:
    return {
        "subject": str(change.subject),
        "symbol": change.symbol,
        "actions": list(change.actions),
        "reason": change.reason,
        "cause": str(change.cause),
        "expected_back": _iso(change.expected_back),
    }


def _action_data(action: Action, indices: Mapping[str, int]) -> dict[str, object]:
    return {
        "id": action.id,
        "needs": list(action.needs),
        "op": action.op,
        "subject": str(action.subject),
        "gpus": [indices.get(g, g) for g in action.gpus],
        "reason": action.reason,
        "cause": str(action.cause),
        "timeout_seconds": round(action.timeout_s, 3),
        "expected": [_iso(moment) for moment in action.expected],
        "ready": action.ready,
    }


def blocked_data(blocked: Blocked) -> dict[str, object]:
    """What is blocked, and by what."""
    return {
        "subject": str(blocked.subject),
        "reason": blocked.reason,
        "message": blocked.message,
        "alternatives": list(blocked.alternatives),
        "earliest_start": _iso(blocked.earliest_start),
    }


def _verdict_data(verdict: Verdict) -> dict[str, object]:
    runner_up = verdict.runner_up
    return {
        "victims": dict(verdict.victims),
        "moves": dict(verdict.moves),
        "cost": dict(verdict.cost),
        "runner_up": None
        if runner_up is None
        else {"victims": list(runner_up[0]), "cost": dict(runner_up[1]), "worse": verdict.worse},
        "optimal": verdict.optimal,
        "bound": dict(verdict.bound),
        "steps": verdict.steps,
        "kept": list(verdict.kept),
    }


def _iso(wall: float | None) -> str | None:
    return None if wall is None else datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")

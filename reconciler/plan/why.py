"""Why these victims: what they cost, who would have been next, and how sure it is that nothing less would do."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from reconciler.plan.actions import Verdict
from reconciler.plan.wishes import Choice, Cost
from reconciler.units import format_duration

_WORDS = {
    "due": "it leaves one waiting that was due earlier",
    "lost_readiness_ms": "lost readiness",
    "moves": "GPUs moved to",
    "start_delay_ms": "start delay",
    "contested": "GPUs that others are pinned to",
    "nvlink_islands": "NVLink islands beyond the first",
    "numa_nodes": "NUMA nodes beyond the first",
    "broken_into_mib": "free memory broken into",
}


def judge(choice: Choice, runner_up: Choice | None, *, all_seen: bool) -> Verdict:
    """The verdict on a choice, beside the best one with other victims that admits the same overlays.

    Args:
        choice: what was chosen
        runner_up: the next best; None: none was found
        all_seen: the search for it came to its end
    """
    steps = choice.proof.steps + (runner_up.proof.steps if runner_up is not None else 0)
    worse = "" if runner_up is None else _worse(choice.levels, choice.cost, runner_up.cost)
    return Verdict(
        victims={_name(victim): _name(by) for victim, by in choice.victims.items()},
        cost=_parts(choice.levels, choice.cost),
        runner_up=None if runner_up is None else (_names(runner_up), _parts(choice.levels, runner_up.cost)),
        worse=worse,
        all_seen=all_seen,
        optimal=choice.proof.optimal,
        bound=_parts(choice.levels, choice.proof.bound),
        steps=steps,
    )


def judge_moves(choice: Choice, without: Choice, by: Mapping[str, str], moved: Container[str]) -> Verdict:
    """The verdict on a choice with moves, beside the best one without any.

    Args:
        choice: what was chosen
        without: the least choice in which nobody moves
        by: who leaves, as a victim or by moving → the wish for which it is
        moved: those of them who move
    """
    leavers = {k: by.get(k, taker) for k, taker in choice.victims.items()}
    return Verdict(
        victims={_name(k): _name(taker) for k, taker in leavers.items() if k not in moved},
        cost=_parts(choice.levels, choice.cost),
        runner_up=(_names(without), _parts(without.levels, without.cost)),
        worse=_worse(choice.levels, choice.cost, without.cost),
        all_seen=True,
        optimal=choice.proof.optimal,
        bound=_parts(choice.levels, choice.proof.bound),
        steps=choice.proof.steps,
        moves={_name(k): _name(taker) for k, taker in leavers.items() if k in moved},
    )


def tell(verdict: Verdict) -> list[str]:
    """A verdict in sentences: who, why not the next best, and how sure it is."""
    who = [*_by_taker(verdict.victims, "{} for {}"), *_by_taker(verdict.moves, "{} moved for {}")]
    told = [f"{'; '.join(who)}: {_cost(verdict.cost)}."]
    if verdict.moves and verdict.runner_up is not None:
        others = ", ".join(verdict.runner_up[0])
        told.append(f"Without moves: {others or 'nobody gives way'} ({verdict.worse}).")
    elif verdict.runner_up is not None:
        told.append(f"The next best: {', '.join(verdict.runner_up[0]) or 'nobody'} ({verdict.worse}).")
    else:
        told.append("No other victims would do." if verdict.all_seen else "No other victims that would do were found.")
    if verdict.optimal:
        told.append("Proved: no choice costs less.")
    else:
        bound = _cost(verdict.bound) or "nothing"
        told.append(f"Not proved: the search ended after {verdict.steps} steps; no choice costs less than {bound}.")
    if verdict.kept:
        before = "what is surely over before (`deadline`, or `on_overrun: stop`) may have them"
        told.append(f"GPUs that are free are kept for {', '.join(verdict.kept)}: {before}.")
    return told


def _by_taker(leavers: Mapping[str, str], form: str) -> list[str]:
    """Who leaves, together for each for whom it is."""
    takers: dict[str, list[str]] = {}
    for name, by in leavers.items():
        takers.setdefault(by, []).append(name)
    return [form.format(", ".join(names), by) for by, names in takers.items()]


def _cost(parts: Mapping[str, int]) -> str:
    """The victims, the moves and what they cost, for people: nothing of who waits, nor of places."""
    told = ("displaced@", "lost_readiness_ms", "moves")
    return ", ".join(_value(name, value) for name, value in parts.items() if name.startswith(told))


def _worse(levels: Sequence[str], cost: Cost, other: Cost) -> str:
    """Where the other cost is greater: the first part in which they differ."""
    for name, mine, its in zip(levels, cost, other, strict=True):
        if mine != its:
            if name == "due":
                return _WORDS[name]
            than = mine if "@" in name else _bare(name, mine)
            return f"{_value(name, its)} instead of {than}"
    return "it costs the same, and comes later by name"


def _value(name: str, value: int) -> str:
    kind, _, priority = name.partition("@")
    if kind == "displaced":
        return f"{value} of priority {priority}"
    if kind == "left_waiting":
        return f"{value} of priority {priority} left waiting"
    return f"{_WORDS[name]} {_bare(name, value)}"


def _bare(name: str, value: int) -> str:
    if name.endswith("_ms"):
        return format_duration(value / 1000)
    return f"{value} MiB" if name.endswith("_mib") else str(value)


def _parts(levels: Sequence[str], cost: Cost) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, value in zip(levels, cost, strict=True):
        if value:
            parts[name] = parts.get(name, 0) + value
    return parts


def _names(choice: Choice) -> tuple[str, ...]:
    return tuple(_name(key) for key in choice.victims)


def _name(key: str) -> str:
    return key.partition("/")[2]

"""Engine profiles that the set points define: a built-in one with some of its parts replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from reconciler.errors import suggest
from reconciler.spec.findings import Findings, clip, text_of
from reconciler.spec.models import EngineCallModel, EngineModel, SleepLevelModel, SleepModel
from reconciler.spec.profiles import (
    NAME_IN_BRACES,
    PLACEHOLDERS,
    PROFILES,
    RESIDUAL,
    EngineCall,
    EngineProfile,
    FailurePattern,
    SleepCheck,
    SleepLevel,
    same,
)
from reconciler.spec.spec import Source
from reconciler.spec.tree import Map, Sequence, child, locate

_PLACES = (
    *((key,) for key in ("args", "model_args", "many_gpus_args", "fraction_args", "drain_args", "env")),
    ("sleep", "args"),
    ("sleep", "env"),
)
"""Where placeholders are filled in."""


def own_profiles(models: Mapping[str, EngineModel], text: Map, findings: Findings) -> dict[str, EngineProfile]:
    """The profiles by name; what is wrong with them goes to the findings.

    Wrong are a name that the program has itself, variables that nobody may set, placeholders that nothing is filled in
    for, an unknown `like`, no program to start, metrics without a page of them, patterns that are no regular
    expressions, a `sleep` without any way to, and a check that cannot tell.
    """
    found: dict[str, EngineProfile] = {}
    for name, model in sorted(models.items()):
        at = locate(text, ("engines", name), key=True)
        if not findings.check_name(at, "engine", name):
            continue
        if name in PROFILES:
            findings.add(
                at, f'engine "{name}" comes with the program', f"choose another name, and write `like: {name}`"
            )
            continue
        findings.check_variables(child(text, "engines", name, "env"))
        findings.check_variables(child(text, "engines", name, "sleep", "env"))
        _check_placeholders(text, name, findings)
        base = PROFILES.get(model.like)
        if base is None:
            place = locate(text, ("engines", name, "like"))
            findings.add(place, f'unknown engine "{clip(model.like)}"', suggest(model.like, PROFILES))
            continue
        profile = _merged(name, base, model)
        if profile.executable is None:
            findings.add(
                at, f'engine "{name}" has no program to start', "write `executable:`, or `like:` another engine"
            )
            continue
        counted = profile.busy_metrics or profile.running_metrics or profile.progress_metrics
        if counted and profile.metrics_path is None:
            findings.add(at, f'engine "{name}" names metrics and no page of them', "write `metrics_path:`")
        for pattern in (*profile.titles, *(f.pattern for f in profile.failures)):
            try:
                re.compile(pattern)
            except re.error as error:
                findings.add(at, f'engine "{name}": {clip(pattern)} is no regular expression: {error}')
        if model.sleep is not None:
            _check_sleep(locate(text, ("engines", name, "sleep"), key=True), name, profile, findings)
        found[name] = profile
    return found


def _check_placeholders(text: Map, name: str, findings: Findings) -> None:
    known = " ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
    for place in _PLACES:
        node = child(text, "engines", name, *place)
        items = node.items if isinstance(node, Sequence) else ()
        values = [entry.node for entry in node.entries.values()] if isinstance(node, Map) else ()
        for item in (*items, *values):
            for word in NAME_IN_BRACES.findall(text_of(item)):
                if word not in PLACEHOLDERS:
                    # the value of a variable is never repeated
                    what = f"placeholder {{{clip(word)}}}" if items else "placeholder in the value of a variable"
                    hint = f"known: {known}; `{place[-1]}` of an endpoint is passed as it is written"
                    findings.add(item.at, f'engine "{name}": unknown {what}', hint)


def _check_sleep(at: Source, name: str, profile: EngineProfile, findings: Findings) -> None:
    if not profile.sleeps:
        findings.add(at, f'engine "{name}" has no way to sleep', "write `level_1:` or `level_2:`, with its calls")
    check = profile.sleep_check
    if check is not None and same(check.asleep, check.awake):
        message = f'engine "{name}" says {json.dumps(check.asleep)} whether it sleeps or not'
        findings.add(at, message, "write `asleep:` and `awake:` of the check, what its field holds then")


def _merged(name: str, base: EngineProfile, model: EngineModel) -> EngineProfile:
    written: dict[str, Any] = {
        "executable": model.executable,
        "base_args": model.args,
        "model_args": model.model_args,
        "file_args": () if model.model_args is not None else None,
        "many_gpus_args": model.many_gpus_args,
        "fraction_args": model.fraction_args,
        "drain_args": model.drain_args,
        "health_path": model.health_path,
        "metrics_path": model.metrics_path,
        "busy_metrics": model.busy_metrics,
        "running_metrics": model.running_metrics,
        "progress_metrics": model.progress_metrics,
        "stop_signal": model.stop_signal,
        "grace_s": model.grace,
        "startup_s": model.startup,
        "load_s": model.load,
        "residual_bytes": model.residual,
        "titles": model.titles,
    }
    if model.sleep is not None:
        written |= _sleep(base, model.sleep)
        if not base.residual_bytes and model.residual is None:
            written["residual_bytes"] = RESIDUAL
    parts = {part: value for part, value in written.items() if value is not None}
    failures = tuple(FailurePattern(f.pattern, f.kind, f.hint) for f in model.failures)
    return replace(
        base,
        name=name,
        like=base.name,
        env={**base.env, **model.env},
        failures=(*failures, *base.failures),
        **parts,
    )


def _sleep(base: EngineProfile, model: SleepModel) -> dict[str, Any]:
    check = model.check
    levels = {number: level for number, level in ((1, model.level_1), (2, model.level_2)) if level is not None}
    return {
        "sleep_args": model.args,
        "sleep_env": {**base.sleep_env, **model.env},
        "sleep_check": check and SleepCheck(check.path, check.field, check.asleep, check.awake),
        "sleep_levels": {**base.sleep_levels, **{number: _level(number, level) for number, level in levels.items()}},
    }


def _level(number: int, model: SleepLevelModel) -> SleepLevel:
    return SleepLevel(
        sleep=tuple(map(_call, model.sleep)),
        wake=tuple(map(_call, model.wake)),
        keeps_weights=number == 1,
        sleep_s=model.sleep_time,
        wake_s=model.wake_time,
    )


def _call(model: EngineCallModel) -> EngineCall:
    body = json.dumps(model.body) if "body" in model.model_fields_set else None
    return EngineCall(model.path, body, model.method, model.status, model.answer)

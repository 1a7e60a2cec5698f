"""The systemd unit that runs the daemon: whether stopping it would take the endpoints along."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from configparser import Error, RawConfigParser
from dataclasses import dataclass
from pathlib import Path

from reconciler.checkup.check import Check

SYSTEM_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/etc/systemd/user",
    "/usr/lib/systemd/user",
)
"""Where units lie, the most important first (systemd.unit(5)); SYSTEMD_UNIT_PATH stands in for all of them."""
_YES = frozenset({"yes", "true", "1", "on"})


@dataclass(frozen=True, slots=True)
class Unit:
    """One service unit with its drop-ins."""

    path: Path
    settings: Mapping[str, str]
    """Of [Service]; of those given several times, the last."""


def check_service(environment: Mapping[str, str], home: Path) -> tuple[Check, ...]:
    """Every unit that runs this program's daemon."""
    named = environment.get("SYSTEMD_UNIT_PATH", "")
    folders = [Path(f) for f in named.split(":") if f] or [home / ".config/systemd/user", *map(Path, SYSTEM_FOLDERS)]
    units, unread = find_units(folders)
    checks = [Check("service", "unknown", f"{path} cannot be read: {why}", "correct it") for path, why in unread]
    for unit in units:
        wrong = tuple(_wrong(unit))
        checks += wrong or [Check("service", "ok", f"{unit.path}: stopping it leaves endpoints running")]
    if not checks:
        hint = "examples/systemd/reconciler.service is one, for when it should start with the box"
        return (Check("service", "ok", "no systemd unit runs the daemon", hint),)
    return tuple(checks)


def find_units(folders: Sequence[Path]) -> tuple[list[Unit], list[tuple[Path, str]]]:
    """Service units whose command is this program's `run`, and files that could not be read; by name."""
    names: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.service")):
            names.setdefault(path.name, path)  # an earlier folder's stands for all later ones
    units: list[Unit] = []
    unread: list[tuple[Path, str]] = []
    for name, path in sorted(names.items()):
        drop_ins: dict[str, Path] = {}
        for folder in folders:
            for file in (folder / f"{name}.d").glob("*.conf"):
                drop_ins.setdefault(file.name, file)
        try:
            unit = Unit(path, _settings([path, *(file for _, file in sorted(drop_ins.items()))]))
        except (OSError, UnicodeDecodeError, Error) as error:
            if "reconciler" in name:
                unread.append((path, str(error).splitlines()[0]))
            continue
        if runs_the_daemon(unit.settings.get("ExecStart", "")):
            units.append(unit)
    return units, unread


def _settings(files: Sequence[Path]) -> Mapping[str, str]:
    parser = RawConfigParser(
        strict=False, delimiters=("=",), comment_prefixes=("#", ";"), inline_comment_prefixes=None, allow_no_value=True
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign] # the documented way to keep names as they are
    for file in files:
        parser.read_string(file.read_text("utf-8").replace("\\\n", " "))
    if not parser.has_section("Service"):
        return {}
    return {name: (value or "").strip() for name, value in parser.items("Service")}


def runs_the_daemon(command: str) -> bool:
    """Whether an ExecStart= is `reconciler … run`, also as `python -m reconciler … run`."""
    try:
        words = shlex.split(command.lstrip("@-:+!"))
    except ValueError:
        return False
    return "run" in words and any(os.path.basename(word) == "reconciler" for word in words)  # noqa: PTH119 - a word


def _wrong(unit: Unit) -> Iterator[Check]:
    """What this unit lacks.

    1. KillMode=: anything but `process` (or `none`) has systemd end all endpoints with the daemon.
    2. PrivateTmp=: endpoints outlive the unit, their /tmp would not.
    3. OOMPolicy=: the OOM killer's victim may be a job.
    4. Type=notify: else the unit counts as up before the box was looked at, and no watchdog works. 5. WatchdogSec=.
    6. ExecReload=. 7. Restart=. 8. Delegate=: else no start gets a control group of its own.
    """
    one, name = unit.settings, unit.path

    def check(level: str, message: str, hint: str) -> Check:
        return Check("service", "error" if level == "error" else "warning", f"{name}: {message}", f"[Service] {hint}")

    mode = one.get("KillMode", "") or "control-group"
    if mode not in ("process", "none"):  # 1
        yield check("error", f"KillMode={mode} would end every endpoint with the daemon", "KillMode=process")
    if one.get("PrivateTmp", "").lower() in {*_YES, "disconnected"}:  # 2
        yield check("warning", "PrivateTmp= takes /tmp from endpoints that outlive the unit", "PrivateTmp=no")
    if one.get("OOMPolicy", "") != "continue":  # 3
        message = "a job that the kernel's OOM killer ends would take the daemon along"
        yield check("warning", message, "OOMPolicy=continue")
    if one.get("Type", "") not in ("notify", "notify-reload"):  # 4
        yield check("warning", "counts as up before the daemon has looked at the box", "Type=notify")
    if one.get("WatchdogSec", "") in ("", "0", "infinity"):  # 5
        yield check("warning", "a daemon that hangs is not noticed", "WatchdogSec=1min")
    if not one.get("ExecReload", "") and one.get("Type", "") != "notify-reload":  # 6
        yield check("warning", "cannot be reloaded", "ExecReload=/bin/kill -HUP $MAINPID")
    if one.get("Restart", "") not in ("always", "on-failure", "on-abnormal"):  # 7
        yield check("warning", "is not started again when it ends", "Restart=always")
    if one.get("Delegate", "").lower() in {"", "no", "false", "0", "off"}:  # 8
        message = "no start gets a control group, so what leaves a tree whose shim was killed can be lost"
        yield check("warning", message, "Delegate=yes")

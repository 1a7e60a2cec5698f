"""The systemd unit that runs the daemon: whether stopping it would take the endpoints along."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import Error, RawConfigParser
from pathlib import Path

from msgspec import Struct

from reconciler.checkup.check import Check, Level
from reconciler.spec.secrecy import names_secret

SYSTEM_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/etc/systemd/user",
    "/usr/lib/systemd/user",
)
"""Where units lie, the most important first (systemd.unit(5)); SYSTEMD_UNIT_PATH stands in for all of them."""


class Unit(Struct, frozen=True):
    """One service unit with its drop-ins."""

    path: Path
    settings: Mapping[str, str]
    """Of [Service]; of those given several times, the last."""
    variables: tuple[str, ...] = ()
    """Names in Environment=."""
    unlimited: bool = False
    """However often it fails within a while, it is started again (StartLimitIntervalSec=0)."""


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
            unit = _read(path, [path, *(file for _, file in sorted(drop_ins.items()))])
        except (OSError, ValueError, Error) as error:
            if "reconciler" in name:
                unread.append((path, str(error).splitlines()[0]))
            continue
        if runs_the_daemon(unit.settings.get("ExecStart", "")):
            units.append(unit)
    return units, unread


def _read(path: Path, files: Sequence[Path]) -> Unit:
    parser = RawConfigParser(
        strict=False, delimiters=("=",), comment_prefixes=("#", ";"), inline_comment_prefixes=None, allow_no_value=True
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign] # the documented way to keep names as they are
    variables: list[str] = []
    for file in files:
        text = file.read_text("utf-8").replace("\\\n", " ")
        parser.read_string(text)
        for line in re.findall(r"(?m)^\s*Environment\s*=(.*)$", text):  # the one setting of which each line counts
            variables += [word.partition("=")[0] for word in shlex.split(line)]
    settings = dict(parser.items("Service")) if parser.has_section("Service") else {}
    limit = parser.get("Unit", "StartLimitIntervalSec", fallback=None) if parser.has_section("Unit") else None
    return Unit(
        path,
        {name: (value or "").strip() for name, value in settings.items()},
        tuple(variables),
        unlimited=(limit or "").strip() in ("0", "0s"),
    )


def runs_the_daemon(command: str) -> bool:
    """Whether an ExecStart= is `reconciler … run`, also as `python -m reconciler … run`."""
    try:
        words = shlex.split(command.lstrip("@-:+!"))
    except ValueError:
        return False
    return "run" in words and any(os.path.basename(word) == "reconciler" for word in words)  # noqa: PTH119 - a word


_YES = frozenset({"yes", "true", "1", "on", "y", "t"})
_NO = frozenset({"", "no", "false", "0", "off", "n", "f"})


class _Rule(Struct, frozen=True):
    """One setting that is not to have certain values."""

    setting: str
    is_wrong: Callable[[str], bool]
    """Asked for the value in lower case; empty: it is not set."""
    level: Level
    message: str
    """`{value}` is filled in."""
    hint: str


def _among(*values: str) -> Callable[[str], bool]:
    return frozenset(values).__contains__


def _not_among(*values: str) -> Callable[[str], bool]:
    return lambda value: value not in values


_RULES = (
    # whoever lives longer than the daemon
    _Rule("KillMode", _among("", "control-group"), "error",
          "KillMode=control-group would end every endpoint with the daemon", "KillMode=process"),
    _Rule("KillMode", _among("mixed"), "error",
          "KillMode=mixed would end every endpoint with the daemon", "KillMode=process"),
    _Rule("KillMode", _among("none"), "error",
          "KillMode=none would not end the daemon itself, and the next one is refused beside it", "KillMode=process"),
    _Rule("PrivatePIDs", _YES.__contains__, "error",
          "PrivatePIDs= ends every process of the unit with the daemon", "PrivatePIDs=no"),
    _Rule("DynamicUser", _YES.__contains__, "error",
          "DynamicUser= gives the user to somebody else while endpoints still run as it", "User= one of its own"),
    _Rule("RemoveIPC", _YES.__contains__, "error",
          "RemoveIPC= takes the shared memory from endpoints that outlive the unit", "RemoveIPC=no"),
    _Rule("PrivateTmp", frozenset({*_YES, "disconnected"}).__contains__, "warning",
          "PrivateTmp= takes /tmp from endpoints that outlive the unit", "PrivateTmp=no"),
    _Rule("PrivateNetwork", _YES.__contains__, "error",
          "PrivateNetwork= puts endpoints where nobody reaches them, the next daemon included", "PrivateNetwork=no"),
    _Rule("OOMPolicy", _not_among("continue"), "warning",
          "a job that the kernel's OOM killer ends would take the daemon along", "OOMPolicy=continue"),
    _Rule("Delegate", _NO.__contains__, "warning",
          "no start gets a control group, so what leaves a tree whose shim was killed can be lost", "Delegate=yes"),
    _Rule("ProtectControlGroups", frozenset({*_YES, "private", "strict"}).__contains__, "warning",
          "ProtectControlGroups= keeps starts from having control groups, whatever Delegate= says",
          "ProtectControlGroups=no"),
    # what has to be seen
    _Rule("PrivateDevices", _YES.__contains__, "error", "PrivateDevices= hides the GPUs", "PrivateDevices=no"),
    _Rule("ProcSubset", _among("pid"), "error", "ProcSubset=pid hides what identity is proved with", "ProcSubset=all"),
    _Rule("ProtectProc", _among("noaccess", "invisible", "ptraceable"), "warning",
          "ProtectProc={value} hides whose the memory of other users' processes is", "ProtectProc=default"),
    # what keeps it running
    _Rule("Type", _not_among("notify", "notify-reload"), "warning",
          "counts as up before the daemon has looked at the box", "Type=notify"),
    _Rule("Type", _among("notify-reload"), "warning",
          "Type=notify-reload has `systemctl reload` wait for an answer that the daemon does not give", "Type=notify"),
    _Rule("WatchdogSec", _among("", "0", "infinity"), "warning", "a daemon that hangs is not noticed",
          "WatchdogSec=1min"),
    _Rule("Restart", _not_among("always", "on-failure", "on-abnormal"), "warning",
          "is not started again when it ends", "Restart=always"),
)  # fmt: skip
"""The facts are those of systemd.kill(5), systemd.exec(5), systemd.service(5) and systemd.resource-control(5)."""


def _wrong(unit: Unit) -> Iterator[Check]:
    """What this unit lacks: what `_RULES` say, then what takes more than one value to tell.

    1. A GPU's device file has to be allowed where not every one is.
    2. ExecReload= has to send SIGHUP: SIGTERM, to which `kill` defaults, ends the daemon.
    3. Five failed starts in ten seconds and systemd gives up (StartLimitBurst=): a driver may take longer to come up.
    4. Environment= can be read by everybody (`systemctl show`), and nothing named like a secret is inherited from it.
    """

    def check(level: Level, message: str, hint: str) -> Check:
        return Check("service", level, f"{unit.path}: {message}", hint)

    def value(setting: str) -> str:
        return unit.settings.get(setting, "")

    for rule in _RULES:
        if rule.is_wrong(value(rule.setting).lower()):
            yield check(rule.level, rule.message.format(value=value(rule.setting)), f"[Service] {rule.hint}")
    if value("DevicePolicy") in ("closed", "strict") and "nvidia" not in value("DeviceAllow"):  # 1
        hint = "[Service] DevicePolicy=auto, or DeviceAllow=char-nvidia-frontend rw and the others of /dev/nvidia*"
        yield check("error", f"DevicePolicy={value('DevicePolicy')} keeps endpoints from the GPUs", hint)
    reload, hint = value("ExecReload"), "[Service] ExecReload=/bin/kill -HUP $MAINPID"
    if not reload and value("Type") != "notify-reload":  # 2
        yield check("warning", "cannot be reloaded", hint)
    elif "kill" in reload and not _HANGUP.search(reload):
        yield check("error", f"ExecReload={reload} would end the daemon", hint)
    pause = _seconds(value("RestartSec") or "100ms")
    if value("Restart") != "no" and pause is not None and pause < _LEAST_PAUSE_S and not unit.unlimited:  # 3
        message = "systemd gives up for good after five starts within ten seconds"
        yield check("warning", message, f"[Service] RestartSec={_LEAST_PAUSE_S:g}s")
    for name in filter(names_secret, unit.variables):  # 4
        message = f"Environment= holds {name}, which every user can read, and which no endpoint inherits"
        yield check("warning", message, "put it into the `env_file` of those who need it")


_LEAST_PAUSE_S = 2.0
_HANGUP = re.compile(r"-(s\s*)?(SIG)?HUP\b|-1\b")
_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0}


def _seconds(span: str) -> float | None:
    """A time span (systemd.time(7)) of the usual units; None: of others."""
    found = re.findall(r"([\d.]+)\s*([a-z]*)", span)
    if not found or any(unit not in _UNITS for _, unit in found):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in found)

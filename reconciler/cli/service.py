"""The service manager, told as systemd asks for it (sd_notify(3)): ready, alive, stopping.

Every message follows a finished tick, so a loop that hangs is silent and the watchdog has something to bite on.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from reconciler.loop.tick import Tick
from reconciler.plan.actions import Event
from reconciler.units import counted

PINGS_PER_TIMEOUT = 3
"""A watchdog that expects a sign every minute gets one every 20 s: one may be late without harm."""


def watchdog_s(environment: Mapping[str, str], pid: int) -> float | None:
    """Seconds between two signs of life that the service manager asks this process for; None: it does not."""
    asked, of = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
    if not asked.isdecimal() or int(asked) == 0 or of != str(pid):
        return None
    return int(asked) / 1e6 / PINGS_PER_TIMEOUT


_UNIT = re.compile(r"^(?:0::|\d+:name=systemd:)(/\S*)/([^/\s]+)\.service(?:/|$)", re.MULTILINE)
"""The innermost service of a process, in its /proc/PID/cgroup."""


def stop_command(pid: int, proc: Path = Path("/proc")) -> str:
    """What a person types to end the daemon `pid` for good: systemd starts one of its own again after a signal.

    Whom systemd executed is told by SYSTEMD_EXEC_PID (systemd.exec(5), since 248), by which unit by the control group.
    """
    try:
        variables = (proc / f"{pid}/environ").read_bytes().split(b"\0")
        unit = _UNIT.search((proc / f"{pid}/cgroup").read_text())
    except OSError:
        return f"kill {pid}"
    if unit is None or f"SYSTEMD_EXEC_PID={pid}".encode() not in variables:
        return f"kill {pid}"
    manager = "systemctl --user" if "/user@" in unit[1] else "systemctl"
    return f"{manager} stop {unit[2]}"


class ServiceManager:
    """A face of the daemon; nobody is told anything where NOTIFY_SOCKET names nobody."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._said = ""

    async def show(self, tick: Tick) -> Sequence[Event]:
        """Ready with the first tick, alive with each; the status line as it changes."""
        if self._address:
            status = f"STATUS={_status(tick)}"
            lines = ["WATCHDOG=1", *([status] if status != self._said else [])]
            self._send("\n".join(lines if self._said else ["READY=1", *lines]))
            self._said = status
        return ()

    async def close(self) -> None:
        """It ends because it was asked to, or because it cannot go on."""
        if self._address:
            self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        # nothing here is worth a moment of the loop, let alone its end: what cannot be delivered at once is dropped
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as out,
        ):
            out.sendto(message.encode("utf-8", "replace"), self._address)


def _status(tick: Tick) -> str:
    views = tick.plan.endpoints.values()
    ready = sum(view.state == "healthy" for view in views)
    open_ones = sum(incident.state != "resolved" for incident in tick.incidents)
    active = sum(record.state in ("active", "overrun") for record in tick.plan.ledger.overlays.values())
    overlays, incidents = counted(active, "overlay"), counted(open_ones, "incident")
    return f"{ready} of {counted(len(views), 'endpoint')} ready, {overlays} active, {incidents}"

"""What the set points name: the files themselves, the programs to be run, their ports, and what earlier runs left."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from reconciler.act.programs import Program, obstacles, program_of
from reconciler.act.shm import Left, told
from reconciler.checkup.check import Check, or_ok
from reconciler.errors import Problem
from reconciler.observe.snapshot import all_endpoints
from reconciler.plan.observed import Observed, Obstacle
from reconciler.spec.spec import Spec
from reconciler.units import counted


def check_files(
    files: Collection[Path], problems: Collection[Problem], cautions: Collection[Problem]
) -> tuple[Check, ...]:
    """The set points and the overlays: whether they mean anything, and what had better not stand in them."""
    found = [Check("files", "error", _where_and_what(p), p.hint) for p in problems]
    found += [Check("files", "warning", _where_and_what(p), p.hint) for p in cautions]
    return or_ok(found, "files", f"{counted(len(files), 'file')} read, nothing wrong with them")


def _where_and_what(problem: Problem) -> str:
    return str(replace(problem, hint=None))


def check_programs(spec: Spec, environment: Mapping[str, str]) -> tuple[Check, ...]:
    """Whether everything that may be started can be: its program, folder, user and env_file.

    `environment`: what a daemon with the same surroundings as this process would hand down.
    """
    programs = tuple(_programs(spec))
    concerned: dict[Obstacle, list[str]] = {}
    for name, program in programs:
        for obstacle in obstacles(program, environment):
            concerned.setdefault(obstacle, []).append(name)
    found = [Check("programs", "error", f"{', '.join(who)}: {o.message}", o.hint) for o, who in concerned.items()]
    for path in sorted({p.env_file for _, p in programs if p.env_file is not None}):
        with suppress(OSError):  # told above
            if Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                message = f"{path} is for secrets, and others may read it"
                found.append(Check("programs", "warning", message, f"chmod 600 {path}"))
    rooted = sum(program.user is None for _, program in programs)
    if os.geteuid() == 0 and rooted:
        hint = "name a `user:` for each, or run the daemon as another user"
        found.append(Check("programs", "warning", f"a daemon of root's would run {rooted} of them as root too", hint))
    return or_ok(found, "programs", f"{len(programs)} that may be started, all there")


def _programs(spec: Spec) -> Iterator[tuple[str, Program]]:
    for one in all_endpoints(spec):
        if one.state != "stopped":
            yield one.name, program_of(one)
    for name, overlay in spec.overlays.items():
        if overlay.workload is not None:
            yield name, program_of(overlay.workload)


def check_ports(spec: Spec, observed: Observed) -> tuple[Check, ...]:
    """Whether somebody else listens where an endpoint should."""
    wanted: dict[int, str] = {e.port: e.name for e in all_endpoints(spec) if e.port is not None}
    found: list[Check] = []
    for port, holder in sorted(observed.ports.items()):
        who = f"pid {holder.pid}: {holder.command or '?'}" if holder.pid else "somebody who cannot be seen from here"
        hint = "end it, or give the endpoint another `port:`"
        found.append(Check("ports", "error", f"port {port} of {wanted.get(port, '?')} is taken by {who}", hint))
    return or_ok(found, "ports", f"{counted(len(wanted), 'port')} wanted, none taken by anybody else")


def check_leftovers(spec: Spec, observed: Observed, shared: Collection[Left]) -> tuple[Check, ...]:
    """What lives on of earlier starts and belongs to nothing that is wanted, or cannot be told; files in /dev/shm."""
    names = {endpoint.name for endpoint in all_endpoints(spec)}
    found: list[Check] = []
    for one in observed.incarnations:
        clean = f"reconciler clean-start {one.subject.name} --dry-run"
        if one.phase == "unknown":
            hint = f"nothing is done to it until it can be told; its records lie in run/{one.id} of the state directory"
            found.append(Check("leftovers", "unknown", f"what became of {one.subject.name} cannot be told", hint))
        elif one.phase in ("exited", "vanished") and one.strays:
            pids = ", ".join(map(str, one.strays))
            message = f"{one.subject.name} has ended, {len(one.strays)} of its processes live on ({pids})"
            found.append(Check("leftovers", "warning", message, f"the daemon ends them; without one, `{clean}`"))
        elif one.subject.kind == "endpoint" and one.subject.name not in names:
            hint = "`reconciler plan` says what becomes of it"
            found.append(Check("leftovers", "warning", f"{one.subject.name} runs and is in no file any more", hint))
    for subject in sorted({left.subject for left in shared}):
        mine = [left for left in shared if left.subject == subject]
        why = next((f": {left.why}" for left in mine if left.why), "")
        hint = "the daemon removes what nobody has any more" + ("; then it is yours to remove" if why else "")
        found.append(Check("leftovers", "warning", f"{subject.name} left {told(mine)}{why}", hint))
    return or_ok(found, "leftovers", "nothing of earlier runs is left")


def has_gangs(spec: Spec) -> bool:
    """Whether some endpoint spans several GPUs."""
    return any(endpoint.gpus.count > 1 for endpoint in all_endpoints(spec))

"""Whether what is to be started can be: its program, folder, user and env_file, looked up as its start would.

Told is only what is certain to keep it from beginning. What cannot be looked at says nothing: the start will tell.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from reconciler.act.account import find_account
from reconciler.act.environment import read_env_file
from reconciler.errors import ActError
from reconciler.plan.observed import Incarnation, Obstacle
from reconciler.spec.engines import launch
from reconciler.spec.spec import EndpointSpec, Spec, Workload

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_CERTAIN = (*_ABSENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ELOOP)
"""Of a file that is to be read: another answer (a disk that fails, a server that is away) may be another soon."""
_CAPABILITIES = 1 << 6 | 1 << 7
"""CAP_SETGID and CAP_SETUID (capabilities(7))."""
_FIRST_LINE_BYTES = 256
"""So much of a script the kernel looks at for its interpreter (execve(2))."""


class Program(Struct, frozen=True):
    """One thing that may be started."""

    name: str
    """As its command names it."""
    cwd: str
    user: str | None
    env_file: str | None
    path: str | None
    """The PATH that its file sets; None: that of the env_file, or the inherited one."""


def program_of(one: EndpointSpec | Workload) -> Program:
    """What is run for an endpoint, or as the work of an overlay."""
    if isinstance(one, Workload):
        name, env = one.command[0], one.env
    else:
        command = launch(one, gpu_indices=(), gpu_total_bytes=(), port=one.port)
        name, env = command.argv[0], command.env
    return Program(name, one.cwd, one.user, one.env_file, env.get("PATH"))


def not_startable(
    spec: Spec, incarnations: Iterable[Incarnation], environment: Mapping[str, str]
) -> dict[str, Obstacle]:
    """What keeps from beginning for whose start somebody would have to end; by process_hash or placement_hash.

    That is the work of overlays, the endpoints that they set, the standby endpoints that they may have started, and an
    endpoint that runs otherwise than its file has it.

    Args:
        spec: who may be started
        incarnations: who runs
        environment: what this process hands down
    """
    running = {i.subject: i.process_hash for i in incarnations if i.alive}
    known: dict[Program, Obstacle | None] = {}
    found: dict[str, Obstacle] = {}
    for key, one in _awaiting(spec, {s.name: h for s, h in running.items() if s.kind == "endpoint"}):
        program = program_of(one)
        if program not in known:
            known[program] = next(obstacles(program, environment), None)
        if (obstacle := known[program]) is not None:
            found[key] = obstacle
    return found


def _awaiting(spec: Spec, running: Mapping[str, str]) -> Iterator[tuple[str, EndpointSpec | Workload]]:
    required: set[str] = set()
    for overlay in spec.overlays.values():
        required.update(overlay.requires)
        if overlay.workload is not None:
            yield overlay.placement_hash, overlay.workload
        yield from ((e.process_hash, e) for e in overlay.endpoints.values() if e.state == "running")
    for endpoint in spec.endpoints.values():
        spare = endpoint.state == "standby" and not required.isdisjoint(endpoint.capabilities)
        edited = running.get(endpoint.name, endpoint.process_hash) != endpoint.process_hash
        if spare or (edited and endpoint.state == "running"):
            yield endpoint.process_hash, endpoint


def obstacles(one: Program, environment: Mapping[str, str]) -> Iterator[Obstacle]:
    """Everything that is certain to keep it from beginning, and what to do.

    Args:
        one: what is to be started
        environment: what the daemon hands down
    """
    path, is_own = one.path, True
    if one.user is not None:
        try:
            is_own = find_account(one.user).uid == os.geteuid()
        except ActError as error:
            if not isinstance(error.__cause__, OSError):
                yield Obstacle(error.message, error.hint)
            is_own = False
        if not is_own and not _may_change_user():
            yield Obstacle(f"only root may run it as {one.user}", "run the daemon as root, or leave `user:` out")
    if one.env_file is not None:
        try:
            secrets = read_env_file(one.env_file)
        except ActError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno in _CERTAIN:
                yield Obstacle(error.message, error.hint or "correct `env_file:`")
        else:
            path = secrets.get("PATH") if path is None else path
    if _is_absent(one.cwd) or os.path.isfile(one.cwd):  # noqa: PTH113 - looked at with every look at the box
        yield Obstacle(f"the folder {one.cwd} is not there", "correct `cwd:`, or make it")
        return
    path = environment.get("PATH", os.defpath) if path is None else path
    obstacle = _without_program(one, path, is_own=is_own)
    if obstacle is not None:
        yield obstacle


def _without_program(one: Program, path: str, *, is_own: bool) -> Obstacle | None:
    """Why no program is found where the shim looks (`shim.execute`); None: there is one, or it cannot be told."""
    on_path = "/" not in one.name
    places = [os.path.join(one.cwd, folder, one.name) for folder in (path.split(":") if on_path else [""])]  # noqa: PTH118
    seen: list[Obstacle] = []
    for place in places:
        if _is_absent(place):
            continue
        refused = _refused(place, is_own=is_own)
        if refused is None:
            return None
        seen.append(refused)
    if seen:
        return seen[0]
    if on_path:
        hint = f"name it by its path (`executable:`), or put its folder on the daemon's PATH, now {path}"
        return Obstacle(f"{one.name} is not on PATH", hint)
    return Obstacle(f"{one.name} is not there", "correct the path, or install it")


def _refused(place: str, *, is_own: bool) -> Obstacle | None:
    """Why the kernel would not execute what lies there; None: it would, or it cannot be told."""
    try:
        mode = os.stat(place).st_mode  # noqa: PTH116
        if stat.S_ISDIR(mode):
            return Obstacle(f"{place} is a folder", "name the program in it")
        # whom an access control list allows to, the group's bits allow as well (acl(5))
        if not mode & 0o111 or (is_own and not os.access(place, os.X_OK, effective_ids=True)):
            return Obstacle(f"{place} may not be executed", f"chmod +x {place}, or name another program")
        interpreter = _interpreter(place) if stat.S_ISREG(mode) else None
    except OSError:
        return None
    if interpreter is not None and _is_absent(interpreter):
        return Obstacle(f"{place}: its interpreter {interpreter} is not there", "install it anew")
    return None


def _interpreter(place: str) -> str | None:
    """Absolute path of what executes a script, as its first line has it; None: it is none, or it cannot be read."""
    with open(place, "rb") as file:  # noqa: PTH123
        first = file.read(_FIRST_LINE_BYTES).partition(b"\n")[0]
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    return words[0] if words and words[0].startswith("/") else None


def _is_absent(path: str) -> bool:
    """Whether it is certain that nothing is there."""
    try:
        os.stat(path)  # noqa: PTH116
    except OSError as error:
        return error.errno in _ABSENT
    return False


def _may_change_user() -> bool:
    """Whether this process may run something as somebody else; True also where that cannot be told."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return True
    return effective & _CAPABILITIES == _CAPABILITIES

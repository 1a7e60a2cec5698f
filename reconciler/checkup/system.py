"""The ground that everything stands on: Python, the packages, the kernel and its limits."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reconciler.cgroup import find_home
from reconciler.checkup.check import Check, or_ok

_PYTHON = (3, 11)
_KERNEL = (5, 4)
"""waitid on a pidfd, hence poll on any of them; pidfd_open(2) is of 5.3."""
_GROUP_SIGNALS = (6, 9)
"""PIDFD_SIGNAL_PROCESS_GROUP (pidfd_send_signal(2)); before, the members are signalled one by one."""
_PACKAGES = (
    "pyyaml",
    "pydantic",
    "watchfiles",
    "nvidia-ml-py",
    "psutil",
    "tenacity",
    "httpx",
    "typer",
    "rich",
    "cronsim",
)
_DESCRIPTORS = 1024
"""A daemon needs about four for each endpoint, and engines inherit the limit: they want many times that."""
_SHM = "/dev/shm"  # noqa: S108 - looked at, not written to
_SHARED_MEMORY = 1 << 30
"""Containers get 64 MiB of /dev/shm unless told otherwise, and NCCL of a gang of GPUs fails with it."""


def check_versions() -> tuple[Check, ...]:
    """Python and the packages."""
    return tuple(_versions())


def _versions() -> Iterator[Check]:
    python = platform.python_version()
    if sys.version_info < _PYTHON:
        wanted = ".".join(map(str, _PYTHON))
        yield Check("versions", "error", f"Python {python} is too old", f"install Python {wanted} or newer")
    found: list[str] = []
    missing: list[str] = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("versions", "error", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    try:
        own = version("reconciler")
    except PackageNotFoundError:
        own = "(not installed as a package)"
    yield Check("versions", "ok", f"reconciler {own}, Python {python}, {', '.join(found)}")


def check_kernel(*, gangs: bool) -> tuple[Check, ...]:
    """What is asked of the kernel; `gangs`: some endpoint spans several GPUs, whose workers talk through /dev/shm."""
    release = os.uname().release
    return or_ok(_kernel(release, gangs=gangs), "kernel", f"Linux {release}")


def _kernel(release: str, *, gangs: bool) -> Iterator[Check]:
    kernel = parse_release(release)
    if kernel is not None and kernel < _KERNEL:
        wanted = ".".join(map(str, _KERNEL))
        yield Check("kernel", "error", f"Linux {release} lacks what ownership is proved with", f"run {wanted} or newer")
    elif kernel is not None and kernel < _GROUP_SIGNALS:
        yield Check(
            "kernel", "ok", f"Linux {release}: process groups are killed member by member (at once from 6.9 on)"
        )
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        hint = "a container's seccomp profile may forbid it: allow pidfd_open and pidfd_send_signal"
        yield Check("kernel", "error", f"pidfd_open does not work here: {error}", hint)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < _DESCRIPTORS:
        hint = "ulimit -n 65536, or LimitNOFILE=65536 in the unit"
        yield Check("kernel", "warning", f"only {limit} open files are allowed, and engines inherit that", hint)
    try:
        room = os.statvfs(_SHM)
    except OSError as error:
        yield Check("kernel", "unknown", f"{_SHM} cannot be seen: {error.strerror}", "mount a tmpfs there")
    else:
        size = room.f_frsize * room.f_blocks
        if gangs and size < _SHARED_MEMORY:
            hint = f"docker run --shm-size=8g, or mount -o remount,size=8g {_SHM}"
            yield Check("kernel", "warning", f"{_SHM} has {size >> 20} MiB, too few for gangs of GPUs", hint)
    if _orphans_stay_zombies():
        hint = "docker run --init, or tini as the container's first process"
        yield Check("kernel", "warning", "process 1 collects nobody: ended processes stay as zombies", hint)


def check_groups(daemon: int | None) -> Check:
    """Whether each start gets a control group of its own; `daemon`: the pid of one that runs; None: run from here."""
    home = find_home(daemon)
    if home.path is not None:
        return Check("kernel", "ok", f"each start gets a control group of its own, in {home.path}")
    message = f"no control groups can be had ({home.reason}): trees are followed by descent, session and a mark"
    return Check("kernel", "ok", message, "run it as a systemd service with Delegate=yes")


def parse_release(release: str) -> tuple[int, int] | None:
    """Major and minor of a kernel's release; None: it names none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else None


def _orphans_stay_zombies() -> bool:
    """Whether process 1 has left dead children behind: an init collects them at once."""
    zombies = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        zombies += state == "Z" and parent == "1"
    return zombies > 2

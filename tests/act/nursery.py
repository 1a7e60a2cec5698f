"""Real incarnations for tests: programs named by how they behave, an actor, and a sweep afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reconciler import cgroup
from reconciler.act.process import Launch, ProcessActor
from reconciler.census import MARKER, members
from reconciler.clock import SystemClock
from reconciler.errors import ActError
from reconciler.identity import boot_id, read_marker
from reconciler.journal.incarnations import Exit, Intent, Records, Run, lock_path, read
from reconciler.journal.layout import StateDir, is_locked
from reconciler.plan.observed import Subject
from reconciler.spec.spec import Stop

DEADLINE_S = 30.0

PATIENT = Stop("SIGTERM", drain_s=0, grace_s=DEADLINE_S)
BRIEF = Stop("SIGTERM", drain_s=0, grace_s=0.3)

Argv = tuple[str, ...]
OpenLog = Callable[..., int]
"""Opens the log at a path, with the usual flags unless others are given, and has the shim write into it."""


def program(source: str) -> Argv:
    """A Python program that says `ready` when it has become what its name promises."""
    preamble = "import os, signal, sys, time\ndef say(word):\n    os.write(1, (word + '\\n').encode())\n"
    return (sys.executable, "-I", "-S", "-c", preamble + source)


OBEDIENT = program("say('ready')\nsignal.pause()")
IGNORING_SIGTERM = program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay('ready')\nwhile True: signal.pause()")
COUNTING_SIGTERMS = program(
    "signal.signal(signal.SIGTERM, lambda *_: say('term'))\nsay('ready')\nwhile True: signal.pause()"
)
STOPPED = program("say('ready')\nos.kill(os.getpid(), signal.SIGSTOP)\nsignal.pause()")
TREE_WITH_SETSID_GRANDCHILD = program("""
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say('ready')
    while True: signal.pause()
signal.pause()
""")
LEAVING_A_DOUBLE_FORKED_DAEMON = program("""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if os.fork() == 0:
    os.setsid()
    between = os.getpid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while os.getppid() == between: time.sleep(0.001)
        say('ready')
        while True: signal.pause()
    os._exit(0)
os.wait()
signal.pause()
""")
FORKING_WITHOUT_END = program("""
say('ready')
while True:
    if os.fork():
        time.sleep(0.001)
        os._exit(0)
    os.setsid() if os.getpid() != os.getsid(0) else None
""")


def exiting_on(path: Path, code: int) -> Argv:
    """Ends with `code` as soon as `path` exists."""
    return program(f"say('ready')\nwhile not os.path.exists({str(path)!r}): time.sleep(0.005)\nsys.exit({code})")


def in_memory(order: bytes) -> int:
    """An order as the shim gets it: a descriptor, to be closed by whoever made it."""
    memory = os.memfd_create("order")
    os.write(memory, order)
    return memory


def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until `condition` holds, or fail."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what or condition}"
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat[stat.rindex(")") + 2] not in "ZX"
    return False


@dataclass
class Nursery:
    """A state directory and what lives by it."""

    state: StateDir
    groups_in: str | None = None
    """The control group that each incarnation gets its own in; None: they run without."""
    ids: list[str] = field(default_factory=list)
    actors: list[ProcessActor] = field(default_factory=list)

    def actor(self) -> ProcessActor:
        """A new one, as after a restart of the daemon."""
        made = ProcessActor(self.state, SystemClock(), boot_id(), groups_in=self.groups_in)
        self.actors.append(made)
        return made

    def launch(self, argv: Argv, *, name: str = "thinking", **changes: Any) -> Launch:
        incarnation = uuid.uuid4().hex
        self.ids.append(incarnation)
        values = {
            "incarnation": incarnation, "subject": Subject("endpoint", name), "process_hash": "hash",
            "gpus": ("GPU-0",), "memory_bytes": (1 << 30,), "exclusive": True, "port": None, "attempt": 0, "argv": argv,
            "env": {"PATH": os.environ["PATH"]}, "cwd": "/",
        }  # fmt: skip
        return Launch(**{**values, **changes})

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Carry it out within the deadline."""

        async def bounded() -> Any:
            return await asyncio.wait_for(work, DEADLINE_S)

        return asyncio.run(bounded())

    def started(self, argv: Argv, *, ready: bool = True, **changes: Any) -> str:
        """The id of an incarnation of `argv` that has said `ready`."""
        launch = self.launch(argv, **changes)
        self.run(self.actor().ensure_started(launch))
        if ready:
            until(lambda: "ready" in self.log(launch), "the program to be ready")
        return launch.incarnation

    def log(self, launch: Launch | str) -> str:
        incarnation = launch if isinstance(launch, str) else launch.incarnation
        intent = self.records(incarnation).intent
        path = Path(intent.log) if isinstance(intent, Intent) else None
        return path.read_text() if path is not None and path.exists() else ""

    def records(self, incarnation: str) -> Records:
        return read(self.state.run / incarnation)

    def run_record(self, incarnation: str) -> Run:
        found = self.records(incarnation).run
        assert isinstance(found, Run), found
        return found

    def group(self, incarnation: str) -> str | None:
        """Its recorded control group."""
        intent = self.records(incarnation).intent
        return intent.group if isinstance(intent, Intent) else None

    def exit_code(self, incarnation: str) -> int:
        """Once it is recorded."""
        until(lambda: self.records(incarnation).exit is not None, "an exit record")
        found = self.records(incarnation).exit
        assert isinstance(found, Exit), found
        return found.exit_code

    def is_over(self, launch: Launch) -> bool:
        """Nothing of it lives, and its subject's lock is free for the next start."""
        lock = lock_path(self.state, launch.subject.kind, launch.subject.name)
        return self.marked(launch.incarnation) == set() and not is_locked(lock)

    def marked(self, incarnation: str) -> set[int]:
        """Living processes that carry its marker, found without the code under test."""
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return {pid for pid in pids if is_running(pid) and read_marker(pid, MARKER) == incarnation}

    def members(self, incarnation: str) -> set[int]:
        return self.members_of(incarnation, self.run_record(incarnation))

    def members_of(self, incarnation: str, run: Run) -> set[int]:
        found = members(
            incarnation=incarnation, pid=run.pid, start_ticks=run.start_ticks, session_id=run.session_id,
            shim_pid=run.shim_pid, shim_start_ticks=run.shim_start_ticks, group=self.group(incarnation),
        )  # fmt: skip
        return {stat.pid for stat in found}

    def close(self) -> None:
        """Nothing of any incarnation lives after this."""
        for incarnation in self.ids:
            with suppress(ActError):
                self.run(self.actor().ensure_killed(incarnation))
        until(lambda: not any(self._kill_marked(i) for i in self.ids), "everything to be gone")
        for actor in self.actors:
            actor.close()
        for group in [cgroup.path_in(self.groups_in, i) for i in self.ids] if self.groups_in is not None else []:
            until(lambda g=group: self._is_emptied(g), f"{group} to be empty")

    @staticmethod
    def _is_emptied(group: str) -> bool:
        """Kill whoever is in it, found without the code under test, and take it away."""
        path = Path(group)
        if path.exists():
            with suppress(OSError):
                (path / "cgroup.freeze").write_text("0")
                (path / "cgroup.kill").write_text("1")
            with suppress(OSError):
                path.rmdir()
        return not path.exists()

    def _kill_marked(self, incarnation: str) -> set[int]:
        found = self.marked(incarnation)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

"""Incarnations made of the real shim and real processes, with everything recorded as the daemon would."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from reconciler.act.forkserver import ForkServer
from reconciler.census import MARKER
from reconciler.clock import Instant, SystemClock
from reconciler.identity import boot_id, read_marker
from reconciler.journal.incarnations import Intent, Run, lock_path, new_id, read, write_intent
from reconciler.journal.layout import StateDir, take_lock


@dataclass
class Cradle:
    """Starts incarnations, and ends whatever is left of them."""

    state: StateDir
    forks: ForkServer = field(default_factory=ForkServer)
    shims: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def intend(self, name: str = "thinking", *, kind: str = "endpoint", port: int | None = None, **changes) -> Intent:
        """The record of a decision; nothing is started."""
        values = {
            "id": new_id(boot_id()), "kind": kind, "name": name, "process_hash": "hash", "gpus": (), "memory_bytes": (),
            "exclusive": False, "port": port, "attempt": 0, "argv": ("x",), "log": str(self.state.logs / "log"),
            "started": SystemClock().now(), "boot_id": boot_id(),
        }  # fmt: skip
        intent = Intent(**{**values, **changes})
        write_intent(self.state, intent)
        self.ids.append(intent.id)
        return intent

    @staticmethod
    def _lock(path: Path) -> int:
        """The subject's lock; the shim of a predecessor that just ended may hold it for some ms more."""
        deadline = time.monotonic() + 10
        while (lock := take_lock(path)) is None:
            assert time.monotonic() < deadline, f"{path} is still held"
            time.sleep(0.01)
        return lock

    def start(self, *argv: str, env: Mapping[str, str] | None = None, **intent_fields) -> str:
        """A running incarnation of `argv`; its id."""
        intent = self.intend(**intent_fields)
        lock = self._lock(lock_path(self.state, intent.kind, intent.name))
        ready_out, ready_in = os.pipe()
        environment = {"PATH": os.environ["PATH"], **(env or {}), MARKER: intent.id, "SPT_NOENV": "1"}
        order = [
            str(self.state.run / intent.id), boot_id(), str(self.state.logs / f"{intent.id}.log"), str(1 << 20),
            "", intent.group or "", "/", "", str(len(argv)), *argv, *(f"{k}={v}" for k, v in environment.items()),
        ]  # fmt: skip
        memory = os.memfd_create("order")
        os.write(memory, "\0".join(order).encode())
        os.lseek(memory, 0, os.SEEK_SET)
        go = os.open(os.devnull, os.O_RDONLY)  # at its end already
        assert self.forks.fork_shim(memory, lock, ready_in, go)
        for fd in (memory, lock, ready_in, go):
            os.close(fd)
        with os.fdopen(ready_out, "rb") as ready:
            said = ready.read()
        assert said == b"", said
        self.shims.append(self.run_record(intent.id).shim_pid)
        return intent.id

    def run_record(self, incarnation: str) -> Run:
        found = read(self.state.run / incarnation).run
        assert isinstance(found, Run), found
        return found

    def end(self) -> None:
        """Nothing of any incarnation lives after this."""
        for shim in self.shims:
            with suppress(ProcessLookupError):
                os.kill(shim, signal.SIGCONT)
        end = time.monotonic() + 20
        while marked := self._marked():
            assert time.monotonic() < end, f"still alive: {marked}"
            for pid in marked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for shim in self.shims:
            with suppress(ProcessLookupError):
                os.kill(shim, signal.SIGKILL)
        self.forks.close()

    def _marked(self) -> list[int]:
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if (marker := read_marker(pid, MARKER)) is not None and marker in self.ids]


LONG_AGO = Instant(1000.0, 10.0)

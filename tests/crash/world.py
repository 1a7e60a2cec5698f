"""One small box with real processes: endpoints, a job now and then, bystanders; and how it has to look at rest."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from files import put
from msgspec.structs import replace
from ports import free_ports
from watching import Watcher

from reconciler.cgroup import find_home, kill, path_in, remove
from reconciler.clock import Instant
from reconciler.errors import ReconcilerError
from reconciler.identity import ProcStat, descendants, is_alive, read_stat
from reconciler.journal.archive import archive
from reconciler.journal.incarnations import Intent, Run, list_ended, list_ids, lock_path, log_path, read, write_intent
from reconciler.journal.layout import StateDir, is_locked
from reconciler.journal.reader import JournalReader
from reconciler.loop.control import ask

HERE = Path(__file__).parent
DEADLINE_S = 40.0
KEPT = 3
"""Past incarnations of an endpoint."""
STUB = [sys.executable, "-I", "-S", str(HERE / "stub.py")]


class Zygote:
    """The process that forks daemons."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._read() == "ready"

    def fork(self, argv: list[str], log: Path) -> int:
        assert self._process.stdin is not None
        print(json.dumps({"argv": argv, "log": str(log)}), file=self._process.stdin, flush=True)
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


class World:
    """Two GPUs, an endpoint on each; a daemon that may be killed at any of its calls."""

    def __init__(self, root: Path, zygote: Zygote, *, every: bool = False) -> None:
        self.root, self.zygote = root, zygote
        self.state = StateDir(root / "state")
        self.setpoints, self.overlays = root / "setpoints.yaml", root / "overlays"
        self.overlays.mkdir(parents=True)
        self.node = root / "node.yaml"
        self.node.write_text("gpus: [{name: small, memory: 80GiB, count: 2}]\ntime_scale: 0.02\nrelease_delay: 20ms\n")
        self.watcher = Watcher(self.state.path, every=every)
        self.watcher.start()
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.bystanders: list[tuple[str, subprocess.Popen[bytes]]] = []
        first, second = free_ports(2)
        self.spec: dict[str, Any] = {
            "version": 1,
            "node": {"name": "box"},
            "policy": {"max_evictions_per_hour": 1000, "min_ready": "0s", "resync": "2s"},
            "endpoints": {
                "important": self._endpoint("important", 0, 900, first),
                "humble": self._endpoint("humble", 1, 100, second),
            },
        }
        self.write()

    def _endpoint(self, name: str, gpu: int, priority: int, port: int) -> dict[str, Any]:
        return {
            "engine": "custom",
            "command": [*STUB, str(self.root), "endpoint", name, "{port}", "--gib", "60"],
            "port": port,
            "gpus": [gpu],
            "memory": "60GiB",
            "priority": priority,
            "health": {"interval": "200ms", "startup": "60s"},
            "stop": {"drain": "0s", "grace": "1s"},
            "restart": {"initial": "0s", "max": "1s", "max_restarts": 1000},
            "logs": {"keep": KEPT},
        }

    def remember(self, name: str) -> None:
        """So many past incarnations of an endpoint that each further one makes the oldest be forgotten."""
        self.state.ensure()
        for number in range(KEPT):
            past = Intent(
                id=uuid4().hex, kind="endpoint", name=name, process_hash="", gpus=(), memory_bytes=(), exclusive=False,
                port=None, attempt=0, argv=("x",), log="", started=Instant(float(number), float(number)), boot_id="",
            )  # fmt: skip
            log = log_path(self.state, "endpoint", name, past.id)
            log.touch()
            folder = write_intent(self.state, replace(past, log=str(log)))
            for record in ("run", "stop", "exit"):
                (folder / f"{record}.json").write_text("{}")
            archive(self.state, past.id, keep=KEPT)

    def let_sleep(self, name: str) -> None:
        """Have this endpoint give way by sleeping, as an engine of its own that is told what vLLM is told."""
        endpoint = self.spec["endpoints"][name]
        program = self.root / "sleepy"
        program.write_text(f"#!{sys.executable} -IS\n{(HERE / 'stub.py').read_text()}")
        program.chmod(0o755)
        # so slow to load that sleeping is always the shorter way
        words = [str(self.root), "endpoint", name, "{port}", "--gib", "60", "--load", "8"]
        self.spec["engines"] = {"sleepy": {"like": "vllm", "executable": str(program), "model_args": words, "args": []}}
        endpoint |= {"engine": "sleepy", "model": "m", "evict": {"method": "sleep", "level": 2}}
        del endpoint["command"]
        self.write()

    # ------------------------------------------------------------ files

    def write(self) -> None:
        put(self.setpoints, yaml.safe_dump(self.spec))

    def drop_job(self, name: str, *, for_s: float = 0.1) -> Path:
        body = {
            "version": 1,
            "priority": 600,
            "allow_baseline_eviction": True,
            "makespan": {"duration": "10m"},
            "gpus": 1,
            "memory": "40GiB",
            "workload": {"command": [*STUB, str(self.root), "job", name, "--gib", "40", "--for", str(for_s)]},
        }
        path = self.overlays / f"{name}.yaml"
        put(path, yaml.safe_dump(body))
        return path

    def noted(self, file: str) -> list[list[str]]:
        with suppress(FileNotFoundError):
            return [line.split() for line in (self.root / file).read_text().splitlines()]
        return []

    def births(self) -> Counter[str]:
        """How often each program began to run; bystanders left out."""
        strangers = {name for name, _ in self.bystanders}
        return Counter(words[0] for words in self.noted("births") if words[0] not in strangers)

    # ------------------------------------------------------------ processes

    def bystander(self, name: str, **environment: str) -> None:
        """A stranger who looks like one of ours, may hold memory, and writes down what signals reach it."""
        argv = [*STUB, str(self.root), "bystander", name, "--gib", "1"]
        holding = {"CUDA_VISIBLE_DEVICES": "1", "RECONCILER_SIM_DIR": str(self.state.sim)}
        holding = holding if self.state.sim.exists() else {}
        self.bystanders.append((name, subprocess.Popen(argv, env={**os.environ, **holding, **environment})))
        self.until(lambda: [words for words in self.noted("births") if words[0] == name], f"{name} to be there")

    def start(self, *words: str) -> None:
        argv = ["--setpoints", str(self.setpoints), "--state-dir", str(self.state.path), "--simulate", str(self.node)]
        self.pid = self.zygote.fork([*argv, *(words or ("run",))], self.root / "daemon.log")
        self.pidfd = os.pidfd_open(self.pid)
        self.watcher.add(self.pid)

    def dead(self) -> bool:
        if self.pidfd is None:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def buried(self) -> None:
        """Forget a daemon that is dead."""
        if self.pidfd is not None:
            os.close(self.pidfd)
        self.pid = self.pidfd = None

    def signal(self, number: signal.Signals) -> None:
        """Send it to the daemon and wait for its end."""
        if self.pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)
            self.until(self.dead, f"the daemon's end by {number.name}")
            self.buried()

    def until(self, look: Callable[[], Any], what: str | Callable[[], str]) -> Any:
        end = time.monotonic() + DEADLINE_S
        while True:
            if self.watcher.problem is not None:
                raise self.watcher.problem
            value = look()
            if value:
                return value
            if time.monotonic() > end:
                text = what if isinstance(what, str) else what()
                raise AssertionError(f"not within {DEADLINE_S:g} s: {text}\n{self.story()}")
            time.sleep(0.05)  # each look has the daemon answer twice

    def events(self) -> str:
        """The last of them, a line each."""
        with JournalReader.open_readonly(self.state.journal) as journal:
            last = journal.events(limit=30, newest=True)
        return "\n".join(f"  {e.wall:.3f} {e.kind} {e.subject} {e.message}" for e in last)

    def story(self) -> str:
        log = (self.root / "daemon.log").read_text() if (self.root / "daemon.log").exists() else ""
        last = "\n".join(str(p) for p in self.watcher.points[-12:])
        return f"trap {self.watcher.trap}\nlast calls:\n{last}\nthe daemon said:\n{log[-3000:]}"

    # ------------------------------------------------------------ what it shows

    def asked(self, op: str) -> Any:
        try:
            return ask(self.state.control_socket, op)
        except (ReconcilerError, OSError, ValueError):
            return None

    def status(self) -> dict[str, Any]:
        return self.asked("status") or {}

    def shown(self, name: str) -> dict[str, Any]:
        """An endpoint as `status` has it; empty while nobody answers."""
        return next((e for e in self.status().get("endpoints", ()) if e["name"] == name), {"pid": None})

    def at_rest(self, jobs: dict[str, tuple[str, ...]]) -> dict[str, Any] | None:
        """The status once nothing is left to do: endpoints healthy, jobs in these states, nothing held or planned."""
        seen = self.status()
        if not seen or any(e["state"] != "healthy" for e in seen["endpoints"]):
            return None
        states = {o["name"]: o["state"] for o in seen["overlays"]}
        if any(states.get(name) not in state for name, state in jobs.items()):
            return None
        values = self.asked("values")
        if not values:
            return None
        ledger = json.loads(values["ledger"])
        put_away = len(list_ids(self.state)) == len(seen["endpoints"])
        ahead = len(self._program()["reconciler-fork"]) == 2  # the fork server, and the shim it has forked in advance
        at_rest = put_away and ahead and not ledger["leases"] and not ledger["agenda"]
        return seen if at_rest else None

    # ------------------------------------------------------------ what must hold at rest

    def living(self) -> dict[str, list[ProcStat]]:
        """Every process of a stub that lives, by name; bystanders left out."""
        found: dict[str, list[ProcStat]] = {}
        for name, pid, ticks in self.noted("births"):
            stat = read_stat(int(pid))
            if stat is not None and stat.start_ticks == int(ticks) and not stat.gone:
                found.setdefault(name, []).append(stat)
        for name, _ in self.bystanders:
            found.pop(name, None)
        return found

    def check(self, seen: dict[str, Any]) -> None:
        """Each endpoint has one leader, which is recorded and shown; nothing else of ours lives; nobody was hit."""
        assert not self.noted("twins"), self.noted("twins")
        assert not self.watcher.strangers, self.watcher.strangers
        living = self.living()
        records = [read(self.state.run / i) for i in list_ids(self.state)]
        for endpoint in seen["endpoints"]:
            name = endpoint["name"]
            leaders = living.pop(name, [])
            assert [p.pid for p in leaders] == [endpoint["pid"]], f"{name}: {leaders}, shown {endpoint['pid']}"
            recorded = [r.run for r in records if isinstance(r.intent, Intent) and r.intent.name == name]
            assert [r.pid for r in recorded if isinstance(r, Run)] == [endpoint["pid"]]
            living.pop(f"{name}/stray", None)
        assert not living, f"unmanaged: {living}"
        assert not [g for g in seen["gpus"] if g["state"] != "ok"], seen["gpus"]
        for record in records:
            assert isinstance(record.intent, Intent)
            assert isinstance(record.run, Run)
            held = is_locked(lock_path(self.state, record.intent.kind, record.intent.name))
            assert held == is_alive(record.run.shim_pid, record.run.shim_start_ticks)
        self.check_bystanders()
        self.check_litter()

    def check_bystanders(self) -> None:
        heard = self.noted("signals")
        for name, process in self.bystanders:
            assert process.poll() is None, f"{name} was ended"
            stat = read_stat(process.pid)
            assert stat is not None
            assert stat.state in "SRD", f"{name} was stopped"
            assert name not in [words[0] for words in heard], f"{name} was signalled: {heard}"
        asked = Counter(tuple(words[:2]) for words in heard if words[2] == "SIGTERM")
        assert all(count == 1 for count in asked.values()), f"asked to end more than once: {asked}"

    def check_litter(self) -> None:
        names = sorted(p.name for p in self.state.path.iterdir())
        assert not [n for n in names if n.startswith("journal.sqlite.")], names
        assert not list(self.state.run.glob(".*")), "the draft of an intent is left over"
        home = find_home().path
        groups = [i for i in list_ended(self.state) if home is not None and Path(path_in(home, i)).exists()]
        assert not groups, f"control groups are left over: {groups}"
        known = {*list_ids(self.state), *list_ended(self.state)}
        logs = [log.name for log in self.state.logs.iterdir() if log.name.split(".")[-2] not in known]
        assert not logs, f"logs are left over: {logs}"
        shims = {r.run.shim_pid for i in list_ids(self.state) if isinstance((r := read(self.state.run / i)).run, Run)}
        below = self._program()
        assert below["reconciler-shim"] <= shims, f"a shim is left over: {below}, {shims}"
        assert len(below["reconciler-fork"]) == 2, f"a fork server, or a shim forked in advance, is left over: {below}"

    def _program(self) -> dict[str, set[int]]:
        """Fork servers and shims that live below the one that forks daemons."""
        found: dict[str, set[int]] = {"reconciler-shim": set(), "reconciler-fork": set()}
        for stat in descendants(self.zygote.pid):
            with suppress(OSError):
                comm = Path(f"/proc/{stat.pid}/comm").read_text().strip()
                found.get(comm, set()).add(stat.pid)
        return found

    def close(self) -> None:
        """Nothing of it lives after this."""
        self.watcher.begin(None)
        if self.pidfd is not None:
            self.signal(signal.SIGKILL)
        for _, process in self.bystanders:
            process.kill()
            process.wait()
        self.watcher.problem = None
        self.until(self._cleared, "everything to be gone")
        self.until(self._emptied, "control groups to be empty")
        self.watcher.close()

    def _emptied(self) -> bool:
        """Take away the groups that no daemon will put away any more, with whoever was still being born there."""
        intents = [read(self.state.run / i).intent for i in list_ids(self.state)]
        groups = [(i.group, i.id) for i in intents if isinstance(i, Intent) and i.group is not None]
        for group in groups:
            kill(*group)
        return not [group for group in groups if not remove(*group)]

    def _cleared(self) -> bool:
        left = [stat.pid for stats in self.living().values() for stat in stats]
        for i in list_ids(self.state):
            run = read(self.state.run / i).run
            if isinstance(run, Run) and is_alive(run.shim_pid, run.shim_start_ticks):
                left.append(run.shim_pid)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

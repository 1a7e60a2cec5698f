"""The engine core and its workers: the processes that hold the memory."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from .box import GIB, Failed, Holder, Node, stat_fields
from .fate import Fate

CONTEXT_BYTES = GIB // 2
RESIDUAL_BYTES = int(1.2 * GIB)
"""What stays on each GPU while an engine sleeps."""
TOKEN_S = 0.02
STEP_S = 0.05
SLEEP_S, WAKE_S, IMPORT_S = 1.0, 2.0, 11.0
BYTES_PER_WEIGHT = (("awq|gptq|int4|4bit|nvfp4|mxfp4", 0.6), ("fp8|int8|8bit", 1.0), ("", 2.0))
"""(pattern in model name or quantisation, bytes); the first that matches wins."""
STRIKES = ("freeze", "dies", "hang")
"""Faults of the script that the engine core brings about."""
WORKER_DIED = "RuntimeError: Worker proc died unexpectedly, shutting down executor."


class Gang:
    """The holders of one engine: this process itself for one GPU, else a worker process for each."""

    def __init__(self, node: Node, gpus: list[int], upwards: socket.socket) -> None:
        self.node = node
        self.own = Holder(node, 0, gpus[0]) if len(gpus) == 1 else None
        self.channels: list[socket.socket] = []
        self.pids: list[int] = []
        self.poll = select.poll()
        for rank, gpu in enumerate(gpus if self.own is None else []):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                # else a worker would keep its siblings and the API server from seeing the engine core's death
                for channel in (*self.channels, ours, upwards):
                    channel.close()
                work(Holder(node, rank, gpu), theirs)
            theirs.close()
            self.channels.append(ours)
            self.pids.append(pid)
            self.poll.register(ours, select.POLLIN)

    def ask(self, order: str) -> None:
        """Have every holder do something; waits for all of them, for ever if one is stopped."""
        if self.own is not None:
            answers = [self.own.obey(order)]
        else:
            for channel in self.channels:
                with suppress(OSError):
                    channel.send(order.encode())
            answers = [self.answer(channel) for channel in self.channels]
        for answer in answers:
            if answer:
                raise Failed(answer)

    def answer(self, channel: socket.socket) -> str:
        """What one worker says to the last order."""
        data = b""
        with suppress(OSError):
            data = channel.recv(4096)
        if not data:
            raise Failed(WORKER_DIED)
        return data.decode().removeprefix("ok")

    def wait(self, seconds: float) -> None:
        """Let time pass (before `time_scale`), noticing the death of a worker."""
        if self.poll.poll(seconds * self.node.scale * 1000):
            raise Failed(WORKER_DIED)

    def close(self) -> None:
        """End the workers: they go when their channel closes, the stopped ones by force."""
        for channel in self.channels:
            channel.close()
        for pid in self.pids:
            end_child(pid, 2.0)


def work(holder: Holder, channel: socket.socket) -> NoReturn:
    """A worker: does what the engine core says until that is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rename(f"VLLM::Worker_TP{holder.rank}")
    while order := channel.recv(4096):
        channel.send(b"ok" + holder.obey(order.decode()).encode())
    os._exit(0)


def end_child(pid: int, patience_s: float) -> None:
    """Wait for a child; past the patience, kill it."""
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(patience_s * 1000):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(fd)


class Plan:
    """What one model needs: seconds to load, bytes on each GPU."""

    def __init__(self, node: Node, options: dict[str, str], gpus: list[int]) -> None:
        model = options["model"]
        figures = node.models.get(model, {})
        label = f"{model} {options.get('quantization', '')}".lower()
        size = re.search(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", model.rsplit("/", 1)[-1].lower())
        billions = int(size[1] or 1) * float(size[2]) / (1 if size[3] == "b" else 1000) if size else None
        # 0.6B 38 s, 235B 98 s, in between by the logarithm; a name that says nothing: as 0.8B, 41 s
        guess = 38 + 60 * math.log((billions or 0.8) / 0.6) / math.log(235 / 0.6)
        self.load_s: float = figures.get("load_s") or min(600.0, max(20.0, guess))
        self.utilization = float(options.get("gpu-memory-utilization", "0.92"))
        self.budget = int(min(node.gpus[gpu]["memory_bytes"] for gpu in gpus) * self.utilization) if gpus else 0
        per_weight = next((b for pattern, b in BYTES_PER_WEIGHT if re.search(pattern, label)))
        weights: int | None = figures.get("weights_bytes")
        if weights is None:
            weights = int(billions * 1e9 * per_weight) if billions else len(gpus) * self.budget * 3 // 10
        self.weights = CONTEXT_BYTES + weights // max(1, len(gpus))
        self.full = self.budget
        if "kv-cache-memory-bytes" in options:
            self.full = self.weights + int(options["kv-cache-memory-bytes"])

    @property
    def import_s(self) -> float:
        """From the start to the engine core's: imports, configuration."""
        return min(IMPORT_S, 0.28 * self.load_s)


def run_engine(node: Node, options: dict[str, str], fate: Fate, channel: socket.socket) -> NoReturn:
    """The engine core: loads, then makes tokens until told to go. It outlives the API server, as the real one does."""

    def leave(*_: object) -> NoReturn:
        sys.exit(0)

    gang, code = None, 0
    try:
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        rename("VLLM::EngineCore")
        gpus = choose(node, options)
        gang = Gang(node, gpus, channel)
        plan = Plan(node, options, gpus)
        load(gang, plan, fate)
        fate.ready()
        tell(channel, "ready")
        Core(gang, plan, fate, channel, options).run()
    except Failed as error:
        print(f"(EngineCore pid={os.getpid()}) {error}", file=sys.stderr, flush=True)
        code = 1
    except SystemExit:
        pass
    except Exception:  # noqa: BLE001 - a forked process must never return into its parent's code
        traceback.print_exc()
        code = 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if gang is not None:
            gang.close()
        os._exit(code)


def choose(node: Node, options: dict[str, str]) -> list[int]:
    """The GPUs of the gang, rank by rank."""
    gpus = node.visible()
    size = int(options.get("tensor-parallel-size", "1")) * int(options.get("pipeline-parallel-size", "1"))
    if size > len(gpus):
        here = f"the number of available GPUs ({len(gpus)}) in this node"
        raise Failed(f"ValueError: World size ({size}) is larger than {here}.")
    return gpus[:size]


def load(gang: Gang, plan: Plan, fate: Fate) -> None:
    """Weights, profiling, KV cache, warm-up; memory grows as it does in vLLM."""
    rest = plan.load_s - plan.import_s
    gang.wait(0.15 * rest)
    gang.ask(f"check {plan.utilization}")
    if fate.strikes("out_of_memory"):
        gang.ask("check 1.01")
    gang.ask(f"set {CONTEXT_BYTES}")
    for part in range(1, 5):
        gang.wait(0.11 * rest)
        gang.ask(f"set {CONTEXT_BYTES + (plan.weights - CONTEXT_BYTES) * part // 4}")
    if plan.weights >= plan.full:
        raise Failed(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
            "initializing the engine."
        )
    gang.wait(0.15 * rest + fate.lasts_s("slow_start"))
    if fate.strikes("crash"):
        raise Failed("RuntimeError: CUDA error: unspecified launch failure")
    while fate.strikes("stuck_start"):
        gang.wait(3600.0)
    gang.ask("profiled and changed" if fate.strikes("memory_changed") else "profiled")
    gang.ask(f"set {plan.full}")
    gang.wait(0.26 * rest)


def tell(channel: socket.socket, message: str) -> None:
    """Send, unless the other side is gone."""
    with suppress(OSError):
        channel.send(message.encode())


class Core:
    """The engine core once it is loaded."""

    def __init__(self, gang: Gang, plan: Plan, fate: Fate, channel: socket.socket, options: dict[str, str]) -> None:
        self.gang, self.plan, self.fate, self.channel = gang, plan, fate, channel
        self.server_pid, self.requests = os.getppid(), 0
        self.moves_memory = "enable-sleep-mode" in options
        self.slots = int(options.get("max-num-seqs", "256"))
        self.jobs: dict[str, float] = {}
        self.asleep = False
        self.told = (0, 0)
        self.token_s = TOKEN_S * gang.node.scale

    def run(self) -> NoReturn:
        """Block until there is something to do; step while requests run."""
        poll = select.poll()
        for channel in (*self.gang.channels, self.channel):
            poll.register(channel, select.POLLIN)
        last = time.monotonic()
        while True:
            running = [] if self.asleep else list(self.jobs)[: self.slots]
            waits = [self.fate.wait_s(*STRIKES)]
            if running:
                waits.append(min(STEP_S, min(self.jobs[job] for job in running) * self.token_s))
            for fd, _ in poll.poll(min((wait * 1000 for wait in waits if wait is not None), default=None)):
                if fd != self.channel.fileno():
                    raise Failed(WORKER_DIED)
                message = self.channel.recv(4096).decode()
                if not message:
                    poll.unregister(self.channel)  # the API server is gone: nobody tells this process to go
                else:
                    self.obey(*message.split(" "))
            self.suffer()
            now = time.monotonic()
            if running:
                self.step(running, (now - last) / self.token_s)
            last = now
            self.count()

    def count(self) -> None:
        """Tell how many requests run and wait: the API server knows no more of it. Asleep it is silent."""
        running = min(len(self.jobs), self.slots)
        if not self.asleep and self.told != (running, len(self.jobs) - running):
            self.told = (running, len(self.jobs) - running)
            tell(self.channel, "count {} {}".format(*self.told))

    def suffer(self) -> None:
        """What the fault script has in store for now."""
        if self.fate.due("freeze", self.requests):
            del self.fate.rules["freeze"]
            if os.getppid() == self.server_pid:  # an orphan has another parent, which must not be stopped
                os.kill(self.server_pid, signal.SIGSTOP)
        if self.fate.due("dies", self.requests):
            raise Failed("RuntimeError: CUDA error: an illegal memory access was encountered")
        if self.fate.due("hang", self.requests):
            # in a call of the driver: no signal but SIGKILL reaches the program
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            while True:
                time.sleep(3600)

    def step(self, running: list[str], tokens: float) -> None:
        """So many tokens for every running job."""
        self.gang.ask("step")
        done = 0.0
        for job in running:
            if job not in self.jobs:
                continue
            done += min(tokens, self.jobs[job])
            self.jobs[job] -= tokens
            if self.jobs[job] <= 0:
                del self.jobs[job]
                tell(self.channel, f"done {job}")
        tell(self.channel, f"tokens {done}")

    def obey(self, verb: str, argument: str, tokens: str = "1") -> None:
        """One order of the API server."""
        if verb == "job":
            self.jobs[argument] = float(tokens)
            self.requests += 1
        elif verb == "drop":
            self.jobs.pop(argument, None)
        elif verb == "sleep":
            self.gang.wait(SLEEP_S)
            if self.fate.strikes("sleep_fails"):
                tell(self.channel, "refused RuntimeError: CUDA error: out of memory")
                return
            if self.moves_memory:
                self.gang.ask(f"set {min(RESIDUAL_BYTES, self.plan.full)}")
            self.asleep = True
            tell(self.channel, "slept")
        elif verb == "wake":
            self.gang.wait(WAKE_S)
            if self.fate.strikes("wake_out_of_memory"):
                raise Failed("torch.OutOfMemoryError: CUDA out of memory. (simulated)")
            if self.moves_memory:
                self.gang.ask(f"set {self.plan.weights if argument == 'weights' else self.plan.full}")
            self.asleep = argument == "weights"
            tell(self.channel, "slept" if self.asleep else "awake")


def rename(title: str) -> None:
    """Change name and command line as setproctitle does, the environment in /proc included unless SPT_NOENV is set."""
    import ctypes

    ctypes.CDLL(None).prctl(15, title.encode()[:15], 0, 0, 0)  # PR_SET_NAME
    arg_start, arg_end, env_start, env_end = (int(f) for f in stat_fields(os.getpid())[45:49])
    if arg_start and arg_end > arg_start:
        ctypes.memset(arg_start, 0, arg_end - arg_start)
        ctypes.memmove(arg_start, title.encode(), min(len(title), arg_end - arg_start - 1))
    if env_start and not os.environ.get("SPT_NOENV"):
        ctypes.memset(env_start, 0, env_end - env_start)

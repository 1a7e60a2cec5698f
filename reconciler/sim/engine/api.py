"""The API server: the process that `vllm serve` is, its port, its signals, and the death of its engine core.

1. Until the engine core is spawned, a signal ends it, as it ends any program.
2. While the engine loads: SIGTERM is lost; SIGINT ends everything, 16 s later, by SIGINT. The engine dies: exit 1.
3. Ready: SIGTERM or SIGINT ends everything, exit 0 half a second later. With `--shutdown-timeout N` requests in flight
   may finish for N s; what is left then, or at once without it, is answered with what there is of it.
   (Without it the real one ended within seconds three times of four; the fourth was still there after minutes.)
4. The engine dies after readiness: `/health` 503 at once, exit 0 after 4.7 s.
5. In whatever way it is leaving, further signals are ignored.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Literal, NoReturn

from . import routes
from .box import Node
from .core import Plan, end_child, run_engine, tell
from .fate import Fate
from .flags import parse
from .wire import Connection

DEATH_TO_EXIT_S, IDLE_STOP_S, INTERRUPT_S = 4.7, 0.5, 16.0

Phase = Literal["loading", "ready", "dead", "leaving"]


class Server:
    """The API server once the engine core is spawned."""

    def __init__(self, node: Node, options: dict[str, str], fate: Fate, listener: socket.socket) -> None:
        self.node, self.fate, self.listener = node, fate, listener
        self.phase: Phase = "loading"
        self.exit_at: float | None = None
        self.connections: dict[int, Connection] = {}
        self.grace_s = float(options.get("shutdown-timeout", "0"))
        self.poll = select.poll()
        self.wake_fd, self.signal_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self.signal_fd, warn_on_full_buffer=False)
        # a handler must exist for the number to reach the pipe; all decisions are made in the loop
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        self.channel, self.engine_pid = self.spawn(options)
        self.desk = routes.Desk(options, fate, lambda message: tell(self.channel, message))
        self.poll.register(self.wake_fd, select.POLLIN)
        self.poll.register(self.channel, select.POLLIN)

    def spawn(self, options: dict[str, str]) -> tuple[socket.socket, int]:
        """Fork the engine core; it keeps neither the port nor anything else of this process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            self.listener.close()
            ours.close()
            os.close(self.wake_fd)
            os.close(self.signal_fd)
            run_engine(self.node, options, self.fate, theirs)
        theirs.close()
        return ours, pid

    def run(self) -> int:
        """Serve until it is over; the exit code."""
        while True:
            timeout = None if self.exit_at is None else max(0.0, self.exit_at - time.monotonic()) * 1000
            events = self.poll.poll(timeout)
            if not events and self.exit_at is not None and time.monotonic() >= self.exit_at:
                return self.leave_now()
            # signals first: after a signal to the whole group the engine's end is in the same batch, and is no death
            for fd, event in sorted(events, key=lambda e: e[0] != self.wake_fd):
                code = self.handle(fd, event)
                if code is not None:
                    return code
            if self.phase == "leaving" and self.exit_at is None and not self.desk.jobs:
                return self.leave_now()

    def handle(self, fd: int, event: int) -> int | None:
        """One event; an exit code when it was the last."""
        if fd == self.wake_fd:
            return self.signalled(os.read(fd, 512))
        if fd == self.channel.fileno():
            message = b""
            with suppress(OSError):
                message = self.channel.recv(4096)
            return self.engine_said(message.decode()) if message else self.engine_died()
        if self.listener.fileno() == fd:
            self.accept()
        elif fd in self.connections:
            self.converse(self.connections[fd], event)
        return None

    def signalled(self, numbers: bytes) -> int | None:
        """SIGTERM or SIGINT came (outcomes 2, 3 and 5 of the module)."""
        interrupted = signal.SIGINT in numbers
        if not interrupted and self.fate.strikes("ignores_sigterm"):
            return None
        if self.phase == "loading":
            if interrupted:
                self.end_engine()
                time.sleep(INTERRUPT_S * self.node.scale)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return None
        if self.phase == "leaving":
            return None
        say("INFO:     Shutting down")
        self.close_port()
        if self.phase == "dead" or not self.desk.jobs or self.grace_s <= 0:
            time.sleep(IDLE_STOP_S * self.node.scale)
            return self.leave_now()
        self.phase = "leaving"
        # the drain ends when the last request does (see `run`), or here
        self.desk.on_empty = self.set_exit
        self.set_exit(self.grace_s)
        return None

    def set_exit(self, after_s: float = 0.0) -> None:
        """Leave, that much later (before `time_scale`)."""
        self.exit_at = time.monotonic() + after_s * self.node.scale

    def engine_said(self, message: str) -> int | None:
        """Progress of the engine core."""
        if message == "ready":
            self.phase = "ready"
            self.fate.ready()
            say("INFO:     Application startup complete.")
            try:
                self.listener.listen(512)
                self.poll.register(self.listener, select.POLLIN)
            except OSError:
                pass  # another server listens by now; the real one stays alive without a port, too
        else:
            self.desk.engine_said(message)
            self.flush()
        return None

    def engine_died(self) -> int | None:
        """The engine core is gone (outcomes 2 and 4)."""
        self.poll.unregister(self.channel)
        os.waitpid(self.engine_pid, 0)
        self.engine_pid = 0
        if self.phase == "loading":
            print(
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
                file=sys.stderr,
                flush=True,
            )
            return 1
        if self.phase == "ready":
            say("ERROR    EngineCore encountered an issue. See stack trace (above) for the root cause.")
            self.phase = "dead"
            self.desk.engine_died()
            self.flush()
            self.set_exit(DEATH_TO_EXIT_S)
        return None

    def end_engine(self) -> None:
        """End the engine core and wait for it."""
        if self.engine_pid:
            with suppress(KeyError):
                self.poll.unregister(self.channel)
            os.kill(self.engine_pid, signal.SIGTERM)
            end_child(self.engine_pid, max(2.5, 5.0 * self.node.scale))
            self.engine_pid = 0

    def leave_now(self) -> int:
        """Nothing is left to wait for."""
        self.end_engine()
        self.desk.abort()
        self.flush()
        say("INFO:     Application shutdown complete.")
        return 0

    def close_port(self) -> None:
        """No new clients; the idle ones are sent away."""
        with suppress(KeyError):
            self.poll.unregister(self.listener)
        self.listener.close()
        for connection in list(self.connections.values()):
            if not connection.busy:
                self.drop(connection)

    def accept(self) -> None:
        """One new client."""
        with suppress(OSError):
            connection = Connection(self.listener.accept()[0])
            self.connections[connection.fd] = connection
            self.poll.register(connection.fd, select.POLLIN)

    def converse(self, connection: Connection, event: int) -> None:
        """Bytes from or to one client."""
        if event & (select.POLLIN | select.POLLHUP | select.POLLERR) and not connection.receive():
            self.drop(connection)
            return
        self.flush(connection)

    def flush(self, *connections: Connection) -> None:
        """Take the requests that are complete, send the answers that are ready; default: of all clients."""
        for connection in connections or tuple(self.connections.values()):
            while request := connection.next_request():
                self.desk.take(connection, request)
            if not connection.send():
                self.drop(connection)
            else:
                self.poll.modify(connection.fd, select.POLLIN | (select.POLLOUT if connection.outbox else 0))

    def drop(self, connection: Connection) -> None:
        """A client is gone, or sent away; what it asked for is aborted."""
        self.poll.unregister(connection.fd)
        del self.connections[connection.fd]
        connection.sock.close()
        self.desk.forget(connection)


def main(argv: list[str]) -> NoReturn:
    """`vllm serve MODEL …`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = parse(argv)
    model = options.setdefault("model", "Qwen/Qwen3-0.6B")
    port = int(options.get("port", "8000"))
    try:
        node = Node()
    except (KeyError, OSError, ValueError) as error:
        fail(f"RuntimeError: RECONCILER_SIM_DIR names no simulated node: {error}")
    fate = Fate(node, options)
    if fate.strikes("ignores_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"INFO     vLLM API server version 0.33.0 (simulated), model {model}")
    time.sleep(Plan(node, options, node.visible()).import_s * node.scale)
    if model.startswith(("/", "./", "../")) and not os.path.exists(model):  # noqa: PTH110
        fail(f"OSError: Can't load the configuration of '{model}'.")
    if not node.visible():
        fail(
            "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`"
        )
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # with SO_REUSEADDR two servers may bind one port while neither listens: exactly the trap of the real one
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setblocking(False)  # noqa: FBT003
    try:
        listener.bind((options.get("host", "127.0.0.1"), port))
    except OSError as error:
        fail(f"OSError: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Server(node, options, fate, listener).run())


def say(line: str) -> None:
    """One line of the log."""
    with suppress(OSError):
        print(f"(APIServer pid={os.getpid()}) {line}", flush=True)


def fail(message: str) -> NoReturn:
    """The start failed."""
    print(f"(APIServer pid={os.getpid()}) {message}", file=sys.stderr, flush=True)
    sys.exit(1)

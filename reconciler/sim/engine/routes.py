"""What the API server answers: health, models, metrics, completions, and sleep in developer mode."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from .fate import Fate
from .flags import VERSION
from .wire import Connection, Request

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")


class Job:
    """A completion that a client waits for."""

    def __init__(self, number: int, connection: Connection, *, chat: bool, stream: bool, tokens: int) -> None:
        self.number, self.connection, self.chat, self.stream, self.tokens = number, connection, chat, stream, tokens


class Desk:
    """Requests in, answers out; whatever needs the engine is sent there and answered when it has spoken."""

    def __init__(self, options: dict[str, str], fate: Fate, tell_engine: Callable[[str], None]) -> None:
        self.fate, self.tell_engine = fate, tell_engine
        self.names = options.get("served-model-name", options["model"]).split()
        self.root = options["model"]
        self.api_key = options.get("api-key", os.environ.get("VLLM_API_KEY", ""))
        self.max_model_len = int(options["max-model-len"]) if options.get("max-model-len", "").isdecimal() else 32768
        self.limited = "max-model-len" in options
        """Without it the limit is the model's own, which is not known here: anything fits."""
        self.slots = int(options.get("max-num-seqs", "256"))
        self.tracks_load = "enable-server-load-tracking" in options
        self.jobs: dict[str, Job] = {}
        self.moving: list[Connection] = []
        """Clients that wait for a sleep or a wake, oldest first."""
        self.asleep = self.dead = False
        self.running = self.waiting = 0
        """As the engine core last told: one that stands still since it was idle shows nothing at work."""
        self.count = self.finished = self.steps = 0
        self.tokens = 0.0
        self.on_empty: Callable[[], None] | None = None
        """Called when the last job is done."""
        self.table: dict[str, tuple[str, Callable[[Connection, Request], None]]] = {
            "/health": ("GET", self.health),
            "/ping": ("GET POST", self.health),
            "/version": ("GET", lambda c, _: self.json(c, {"version": VERSION})),
            "/load": ("GET", lambda c, _: self.json(c, {"server_load": len(self.jobs) if self.tracks_load else 0})),
            "/metrics": ("GET", lambda c, _: c.answer(200, self.metrics().encode(), "text/plain; version=0.0.4")),
            "/v1/models": ("GET", self.models),
            **dict.fromkeys(COMPLETIONS, ("POST", self.complete)),
        }
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            self.table["/sleep"] = ("POST", self.sleep)
            self.table["/wake_up"] = ("POST", self.wake)
            self.table["/is_sleeping"] = ("GET", lambda c, _: self.json(c, {"is_sleeping": self.asleep}))
            self.table["/collective_rpc"] = ("POST", lambda c, _: self.json(c, {"results": [None]}))

    def take(self, connection: Connection, request: Request) -> None:
        """One request."""
        methods, route = self.table.get(request.path, ("", None))
        if route is None:
            self.json(connection, {"detail": "Not Found"}, 404)
        elif request.method not in methods.split():
            self.json(connection, {"detail": "Method Not Allowed"}, 405)
        elif (
            self.api_key
            and request.path.startswith("/v1")
            and request.headers.get("authorization") != f"Bearer {self.api_key}"
        ):
            self.json(connection, {"error": "Unauthorized"}, 401)
        else:
            route(connection, request)

    def engine_said(self, message: str) -> None:
        """Tokens were made, a job is done, or memory has moved."""
        verb, _, argument = message.partition(" ")
        if verb == "tokens":
            self.steps += 1
            self.tokens += float(argument)
        elif verb == "count":
            self.running, self.waiting = (int(word) for word in argument.split())
        elif verb == "done" and argument in self.jobs:
            self.finish(self.jobs.pop(argument))
        elif verb in ("slept", "awake"):
            self.asleep = verb == "slept"
            if self.moving:
                self.moving.pop(0).answer(200)
        elif verb == "refused" and self.moving:
            self.error(self.moving.pop(0), 500, "InternalServerError", argument)

    def engine_died(self) -> None:
        """Everybody who waits gets an error."""
        self.dead = True
        waiting = [job.connection for job in self.jobs.values() if not job.stream] + self.moving
        for job in self.jobs.values():
            if job.stream:
                job.connection.close_stream({"error": {"message": "EngineCore encountered an issue.", "code": 500}})
        self.jobs.clear()
        self.moving.clear()
        for connection in waiting:
            self.error(connection, 500, "InternalServerError", "EngineCore encountered an issue.")

    def abort(self) -> None:
        """The engine was ended: what it had at hand is answered with what there is of it."""
        self.on_empty = None
        while self.jobs:
            self.finish(self.jobs.popitem()[1], "abort")

    def forget(self, connection: Connection) -> None:
        """A client is gone: its job is aborted."""
        for name in [name for name, job in self.jobs.items() if job.connection is connection]:
            del self.jobs[name]
            self.tell_engine(f"drop {name}")

    # ------------------------------------------------------------ routes

    def health(self, connection: Connection, _: Request) -> None:
        """200 while asleep and while the engine hangs, too: only a dead engine shows here."""
        if self.fate.due("slow_probe", self.count):
            time.sleep(self.fate.lasts_s("slow_probe") * self.fate.scale)  # whoever else asks waits, too
        connection.answer(503 if self.dead else 200)

    def models(self, connection: Connection, _: Request) -> None:
        """The served names; says nothing of the engine's health."""
        common = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": self.root}
        rows = [{"id": name, **common, "parent": None, "max_model_len": self.max_model_len} for name in self.names]
        self.json(connection, {"object": "list", "data": rows})

    def complete(self, connection: Connection, request: Request) -> None:
        """A completion: refused at once, or a job for the engine."""
        asked = request.document()
        if asked is None:
            self.error(connection, 400, "BadRequestError", "the body is not a JSON object")
            return
        if asked.get("model", self.names[0]) not in self.names:
            self.error(connection, 404, "NotFoundError", f"The model `{asked['model']}` does not exist.")
            return
        chat = request.path == COMPLETIONS[1]
        prompt = len(str(asked.get("prompt") or asked.get("messages") or "")) // 8  # a token is no longer than that
        wanted = asked.get("max_completion_tokens") or asked.get("max_tokens") or (128 if chat else 16)
        if not isinstance(wanted, int) or wanted < 1:
            self.error(connection, 400, "BadRequestError", "max_tokens must be at least 1")
            return
        if self.limited and prompt + wanted > self.max_model_len:
            message = f"This model's maximum context length is {self.max_model_len} tokens."
            self.error(connection, 400, "BadRequestError", message)
            return
        if self.dead:
            self.error(connection, 500, "InternalServerError", "EngineCore encountered an issue.")
            return
        self.count += 1
        job = Job(self.count, connection, chat=chat, stream=bool(asked.get("stream")), tokens=wanted)
        self.jobs[str(job.number)] = job
        if job.stream:
            connection.open_stream()
        self.tell_engine(f"job {job.number} {wanted}")

    def finish(self, job: Job, reason: str = "length") -> None:
        """The engine has made all its tokens, or was ended."""
        self.finished += 1
        text = "token " * min(job.tokens, 64)
        said: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if job.chat:
            said["delta" if job.stream else "message"] = {"role": "assistant", "content": text}
        else:
            said["text"] = text
        kind = "chat.completion" if job.chat else "text_completion"
        answer = {
            "id": f"cmpl-{job.number}",
            "object": kind + (".chunk" if job.stream and job.chat else ""),
            "created": int(time.time()),
            "model": self.names[0],
            "choices": [said],
            "usage": {"prompt_tokens": 8, "completion_tokens": job.tokens, "total_tokens": job.tokens + 8},
        }
        if job.stream:
            job.connection.close_stream(answer)
        else:
            self.json(job.connection, answer)
        if not self.jobs and self.on_empty is not None:
            self.on_empty()

    def sleep(self, connection: Connection, request: Request) -> None:
        """Give the memory up, but for a residue."""
        self.move(connection, "sleep 2" if request.query.get("level") == "2" else "sleep 1")

    def wake(self, connection: Connection, request: Request) -> None:
        """Take the memory back: all of it, or by `tags` the weights first."""
        self.move(connection, "wake weights" if request.query.get("tags") == "weights" else "wake all")

    def move(self, connection: Connection, order: str) -> None:
        """Answered when the engine has done it."""
        if self.dead:
            self.error(connection, 500, "InternalServerError", "EngineCore encountered an issue.")
            return
        self.moving.append(connection)
        self.tell_engine(order)

    def metrics(self) -> str:
        """Prometheus text, with the names of vLLM's v1 engine."""
        label = f'{{engine="0",model_name="{self.names[0]}"}}'
        rows = (
            ("num_requests_running", "gauge", "", float(self.running)),
            ("num_requests_waiting", "gauge", "", float(self.waiting)),
            ("kv_cache_usage_perc", "gauge", "", min(1.0, self.running / self.slots)),
            ("generation_tokens_total", "counter", "", self.tokens),
            ("request_success_total", "counter", "", float(self.finished)),
            ("iteration_tokens_total", "histogram", "_sum", self.tokens),
            ("iteration_tokens_total", "", "_count", float(self.steps)),
        )
        lines = []
        for name, kind, suffix, value in rows:
            if kind:
                lines.append(f"# TYPE vllm:{name} {kind}")
            if kind == "histogram":
                lines.append(f'vllm:{name}_bucket{label[:-1]},le="+Inf"}} {float(self.steps)}')
            lines.append(f"vllm:{name}{suffix}{label} {value}")
        return "\n".join(lines) + "\n"

    def json(self, connection: Connection, document: object, status: int = 200) -> None:
        """Answer with a document."""
        connection.answer(status, json.dumps(document).encode())

    def error(self, connection: Connection, status: int, kind: str, message: str) -> None:
        """Answer with an error in OpenAI's form."""
        self.json(connection, {"error": {"message": message, "type": kind, "param": None, "code": status}}, status)

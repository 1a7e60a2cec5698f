"""One message to one notifier: an HTTP request, or a program with the message on its standard input.

A webhook's address is a secret as often as not (whoever has it can post). Nothing here puts more of one than its host
into a message.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.act.environment import child_environment
from reconciler.errors import ActError
from reconciler.health.incident import RANK
from reconciler.health.notices import Notice
from reconciler.plan.status import incident_data
from reconciler.spec.spec import Notifier
from reconciler.spec.trust import read_trusted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tenacity import RetryCallState

REQUEST_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 30.0
ATTEMPTS = 5
"""Of one delivery; with the waits between them they take a minute at most."""
RETRY_INITIAL_S, RETRY_MAX_S = 0.5, 20.0
MOST_LINES = 20
"""Of a text message: chats cut longer ones, and nobody reads on."""
_SYMBOLS = {"opened": "▲", "escalated": "▲▲", "resolved": "✓"}
_NTFY_PRIORITY = {"critical": "5", "warning": "4", "info": "3"}


class _RefusedError(ActError):
    """The answer will be the same next time."""


class Message(Struct, frozen=True):
    """What is sent, whichever the way."""

    body: bytes
    headers: Mapping[str, str]


async def deliver(
    notifier: Notifier,
    node: str,
    notices: Sequence[Notice],
    inherited: Mapping[str, str],
    *,
    open_files: int | None = None,
) -> None:
    """Tell; what fails for a passing reason is tried `ATTEMPTS` times, with random waits that double.

    Args:
        notifier: whom
        node: name of this box
        notices: what, at least one
        inherited: this process's environment, of which a command gets what a leader would
        open_files: a command's soft limit of descriptors; None: this process's own

    Raises:
        ActError: it did not arrive; the message holds no secret.
    """
    from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    def passing(error: BaseException) -> bool:
        return isinstance(error, ActError) and not isinstance(error, _RefusedError)

    def last(state: RetryCallState) -> None:
        if state.outcome is not None:
            state.outcome.result()  # raises what the last attempt raised

    message = message_of(notifier, node, notices)
    retrying = AsyncRetrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=RETRY_INITIAL_S, max=RETRY_MAX_S),
        retry=retry_if_exception(passing),
        retry_error_callback=last,
    )
    if notifier.command is not None:
        await retrying(_run, notifier, message, inherited, open_files)
    else:
        await retrying(_post, notifier, message)


def message_of(notifier: Notifier, node: str, notices: Sequence[Notice]) -> Message:
    """The message in the notifier's format: `json` for programs, `slack` and `ntfy` for people."""
    lines = [_line(notice) for notice in notices[:MOST_LINES]]
    if len(notices) > MOST_LINES:
        lines.append(f"… and {len(notices) - MOST_LINES} more; see `reconciler incidents`")
    match notifier.format:
        case "slack":
            text = "\n".join([f"*{node}*", *lines])
            return _json({"text": text}, notifier)
        case "ntfy":
            open_ones = [n.incident.severity for n in notices if n.change != "resolved"]
            worst = max(open_ones, key=RANK.__getitem__, default="info")
            own = {
                "Content-Type": "text/plain; charset=utf-8",
                "X-Title": _title(node, notices),
                "X-Priority": _NTFY_PRIORITY[worst],
                "X-Tags": "warning" if open_ones else "white_check_mark",
            }
            return Message("\n".join(lines).encode(), {**own, **notifier.headers})
        case _:
            found = [{"change": notice.change, "incident": incident_data(notice.incident)} for notice in notices]
            return _json({"version": 1, "node": node, "text": "\n".join(lines), "notices": found}, notifier)


def _json(value: Mapping[str, Any], notifier: Notifier) -> Message:
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Message(body, {"Content-Type": "application/json", **notifier.headers})


def _line(notice: Notice) -> str:
    incident = notice.incident
    return f"{_SYMBOLS[notice.change]} {notice.change} {incident.kind} {incident.subject}: {incident.message}"


def _title(node: str, notices: Iterable[Notice]) -> str:
    told = list(notices)
    what = f"{told[0].incident.kind} {told[0].incident.subject}" if len(told) == 1 else f"{len(told)} notices"
    return f"{node}: {what}".encode("ascii", "replace").decode()  # a header is ASCII


# ---------------------------------------------------------------- by HTTP


async def _post(notifier: Notifier, message: Message) -> None:
    from reconciler.http import httpx

    url = _address(notifier)
    host = urlsplit(url).hostname or "?"
    try:
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, follow_redirects=False) as client:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):  # httpx bounds each read, not the whole
                async with client.stream("POST", url, content=message.body, headers=dict(message.headers)) as answer:
                    status = answer.status_code
    except (httpx.TimeoutException, TimeoutError):
        raise ActError(f"{host} did not answer within {REQUEST_TIMEOUT_S:g} s") from None
    except httpx.HTTPError as error:  # its own text may hold the address
        raise ActError(f"{host} cannot be reached ({type(error).__name__})") from None
    except (httpx.InvalidURL, ValueError):
        raise _RefusedError(f"the address of {notifier.name} is not a URL") from None
    if 200 <= status < 300:
        return
    kind = ActError if status in (408, 425, 429) or status >= 500 else _RefusedError
    raise kind(f"{host} answered with status {status}")


def _address(notifier: Notifier) -> str:
    if notifier.webhook is not None:
        return notifier.webhook
    path = notifier.webhook_file or ""
    try:
        url = read_trusted(path).decode("utf-8", "replace").strip()
    except OSError as error:
        raise _RefusedError(f"{path}: webhook_file cannot be read: {error.strerror}") from None
    if urlsplit(url).scheme not in ("http", "https") or any(c.isspace() for c in url):
        raise _RefusedError(f"{path}: webhook_file holds no http:// or https:// address")
    return url


# ---------------------------------------------------------------- by a program


async def _run(notifier: Notifier, message: Message, inherited: Mapping[str, str], open_files: int | None) -> None:
    """Run the command once in a session of its own; whatever is left of that when time is up is killed."""
    command = list(notifier.command or ())
    process = _spawn(command, message.body, child_environment(inherited))
    if open_files is not None:
        with suppress(OSError, ValueError):  # it has ended already
            hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files, hard))
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            await _ended(process.pid)
    except TimeoutError:
        raise ActError(f"{command[0]} did not end within {COMMAND_TIMEOUT_S:g} s and was killed") from None
    finally:
        # ChildProcessError: it was collected by the kernel, as happens where SIGCHLD is ignored, and its number may be
        # another's. Otherwise it was not waited for yet, so the number is still its own, dead or alive.
        with suppress(ProcessLookupError, PermissionError, ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # noqa: ASYNC222 - WNOHANG
            os.killpg(process.pid, signal.SIGKILL)
        code = await asyncio.to_thread(process.wait)
    if code != 0:
        raise ActError(f"{command[0]} ended with {'signal' if code < 0 else 'exit code'} {abs(code)}")


def _spawn(command: list[str], body: bytes, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with os.fdopen(os.memfd_create("notice"), "w+b") as stdin:  # no pipe: it may read as slowly as it likes
        stdin.write(body)
        stdin.seek(0)
        try:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.DEVNULL,  # what it says to stderr is said with the daemon's own
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise _RefusedError(f"{command[0]} cannot be started: {error.strerror}") from None


async def _ended(pid: int) -> None:
    """Wait until a child of ours has ended; it stays to be waited for."""
    running, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # the kernel has collected it already
        return
    try:
        running.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        running.remove_reader(descriptor)
        os.close(descriptor)

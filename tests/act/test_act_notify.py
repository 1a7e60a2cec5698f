"""Notices as they leave: to a real HTTP server and to real programs, well, slow, wrong and dead."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from letter_box import letter_box

from reconciler.act import notify
from reconciler.act.notify import ATTEMPTS, deliver
from reconciler.clock import Instant
from reconciler.errors import ActError
from reconciler.health.incident import Incident
from reconciler.health.notices import Notice
from reconciler.spec.spec import Notifier, Source

AT = Instant(1_764_000_000.0, 5000.0)


def notice(change: Any = "opened", subject: str = "chat", severity: Any = "critical") -> Notice:
    message = "crashed with exit code 1"
    return Notice(
        change,
        Incident(f"Unplanned/{subject}@1", "Unplanned", subject, severity, message, "open", AT, AT.wall, AT.wall),
    )


def notifier(**fields: Any) -> Notifier:
    given: dict[str, Any] = {
        "name": "phone", "severity": "warning", "format": "json", "webhook": None, "webhook_file": None,
        "command": None, "headers": {}, "source": Source("setpoints.yaml", 1, 1), **fields,
    }  # fmt: skip
    return Notifier(**given)


def send(to: Notifier, *notices: Notice, inherited: dict[str, str] | None = None) -> None:
    asyncio.run(deliver(to, "box", notices or (notice(),), inherited or {}))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "RETRY_INITIAL_S", 0.001)
    monkeypatch.setattr(notify, "RETRY_MAX_S", 0.01)


def test_json_has_every_field_of_every_notice() -> None:
    with letter_box() as box:
        send(notifier(webhook=box.url, headers={"Authorization": "Bearer t0p"}), notice(), notice("resolved", "code"))
    (path, headers, _), (message,) = box.requests[0], box.messages
    assert path == "/hook/canary-5f2c"
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", "Bearer t0p")
    assert (message["version"], message["node"]) == (1, "box")
    assert box.told() == [("opened", "Unplanned", "chat"), ("resolved", "Unplanned", "code")]
    assert message["notices"][0]["incident"]["severity"] == "critical"
    assert "crashed with exit code 1" in message["text"]


def test_slack_gets_its_text_and_ntfy_its_headers() -> None:
    with letter_box() as box:
        send(notifier(webhook=box.url, format="slack"))
        send(notifier(webhook=box.url, format="ntfy"))
        send(notifier(webhook=box.url, format="ntfy"), notice("resolved"))
    slack = json.loads(box.requests[0][2])
    assert set(slack) == {"text"}
    assert slack["text"].splitlines() == ["*box*", "▲ opened Unplanned chat: crashed with exit code 1"]
    _, headers, body = box.requests[1]
    assert headers["X-Title"] == "box: Unplanned chat"
    assert headers["X-Priority"] == "5"
    assert body.decode() == "▲ opened Unplanned chat: crashed with exit code 1"
    assert box.requests[2][1]["X-Priority"] == "3"


def test_a_long_list_is_cut_for_people_and_whole_for_programs() -> None:
    many = [notice(subject=f"e{i}") for i in range(30)]
    with letter_box() as box:
        send(notifier(webhook=box.url, format="ntfy"), *many)
        send(notifier(webhook=box.url), *many)
    assert len(box.requests[0][2].decode().splitlines()) == 21
    assert "10 more" in box.requests[0][2].decode()
    assert len(json.loads(box.requests[1][2])["notices"]) == 30


def test_a_passing_failure_is_tried_again_until_it_arrives() -> None:
    with letter_box(500, 429, 503) as box:
        send(notifier(webhook=box.url))
    assert len(box.requests) == 4


def test_what_stays_wrong_is_given_up_and_told_without_the_address() -> None:
    with (
        letter_box(*[502] * 20) as box,
        pytest.raises(ActError, match=r"127\.0\.0\.1 answered with status 502") as raised,
    ):
        send(notifier(webhook=box.url))
    assert len(box.requests) == ATTEMPTS
    assert "canary" not in str(raised.value)


def test_a_refusal_is_not_repeated() -> None:
    with letter_box(404, 404) as box, pytest.raises(ActError, match="status 404"):
        send(notifier(webhook=box.url))
    assert len(box.requests) == 1


def test_nobody_listening_is_told_without_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/canary"
        with pytest.raises(ActError, match="cannot be reached") as raised:
            send(notifier(webhook=url))
    assert "canary" not in str(raised.value)


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "REQUEST_TIMEOUT_S", 0.1)
    with letter_box() as box:
        box.silent.set()
        began = time.monotonic()
        with pytest.raises(ActError, match="did not answer"):
            send(notifier(webhook=box.url))
    assert time.monotonic() - began < 5


def test_an_address_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "hook"
    with letter_box() as box:
        file.write_text(box.url + "\n")
        file.chmod(0o600)
        send(notifier(webhook_file=str(file)))
        assert len(box.requests) == 1
    file.write_text("canary")
    with pytest.raises(ActError, match="holds no http") as raised:
        send(notifier(webhook_file=str(file)))
    assert "canary" not in str(raised.value)
    file.chmod(0o666)
    with pytest.raises(ActError, match="written by everybody"):
        send(notifier(webhook_file=str(file)))


def test_a_command_gets_the_message_and_an_environment_of_leaders(tmp_path: Path) -> None:
    script = "import json, os, sys; json.dump([json.load(sys.stdin), dict(os.environ)], open(sys.argv[1], 'w'))"
    to = notifier(command=(sys.executable, "-c", script, str(tmp_path / "out")))
    send(to, inherited={"PATH": os.environ["PATH"], "MY_TOKEN": "canary"})
    message, environment = json.loads((tmp_path / "out").read_text())
    assert message["notices"][0]["incident"]["subject"] == "chat"
    assert "PATH" in environment
    assert "MY_TOKEN" not in environment


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(ActError, match="ended with exit code 3"):
        send(notifier(command=(sys.executable, "-c", "raise SystemExit(3)")))
    with pytest.raises(ActError, match="cannot be started"):
        send(notifier(command=("/no/such/program",)))


def test_the_number_of_a_command_that_the_kernel_collected_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SIGCHLD is ignored children are collected at once, and their numbers given away."""
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _number: signalled.append(group))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        for script in ("pass", "import time; time.sleep(0.2)"):
            send(notifier(command=(sys.executable, "-I", "-S", "-c", script)))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert signalled == []
    send(notifier(command=(sys.executable, "-I", "-S", "-c", "pass")))
    assert len(signalled) == 1, "its group may hold others that it left behind"


def test_a_command_that_hangs_ends_with_everything_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "ATTEMPTS", 1)
    script = 'sleep 600 & echo "$$ $!" > "$0.new"; mv "$0.new" "$0"; wait'
    for seconds in (0.3, 3.0, 30.0):  # as long as it takes to begin, where the machine is busy
        monkeypatch.setattr(notify, "COMMAND_TIMEOUT_S", seconds)
        pids = tmp_path / f"{seconds:g}"
        with pytest.raises(ActError, match=rf"did not end within {re.escape(f'{seconds:g}')} s and was killed"):
            send(notifier(command=("sh", "-c", script, str(pids))))
        if pids.exists():
            break
    leader, child = map(int, pids.read_text().split())
    assert not Path(f"/proc/{leader}").exists()
    end = time.monotonic() + 30
    while (stat := Path(f"/proc/{child}/stat")).exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_address_is_in_no_text_of_a_notifier() -> None:
    shown = repr(notifier(webhook="https://hooks.example/canary", headers={"Authorization": "canary"}))
    assert "canary" not in shown

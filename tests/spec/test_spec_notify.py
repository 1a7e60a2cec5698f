"""`notify` and `metrics` in set points: what is accepted, what is refused where, and that no message has a secret."""

from __future__ import annotations

import pytest

from reconciler.errors import SpecError
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import Spec


def read(text: str) -> Spec:
    return resolve(SourceText("/etc/box/setpoints.yaml", "version: 1\n" + text), (), hostname="b", read_env_file=_none)


def _none(_: str) -> bytes:
    return b""


def test_each_way_of_telling_is_read() -> None:
    spec = read(
        "notify:\n"
        "  phone: {webhook: 'https://ntfy.sh/canary', format: ntfy, severity: critical}\n"
        "  chat: {webhook_file: slack.url, format: slack}\n"
        "  pager: {command: [page, --now], severity: info}\n"
        "metrics: {port: 9464}\n"
    )
    phone, chat, pager = spec.notify["phone"], spec.notify["chat"], spec.notify["pager"]
    assert (phone.webhook, phone.severity, phone.format) == ("https://ntfy.sh/canary", "critical", "ntfy")
    assert (chat.webhook_file, chat.severity) == ("/etc/box/slack.url", "warning")
    assert (pager.command, pager.format) == (("page", "--now"), "json")
    assert spec.metrics_port == 9464
    assert "canary" not in repr(spec)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("notify: {a: {}}", 2, "no way to tell"),
        ("notify:\n  a: {webhook: 'https://x/y', command: [z]}", 3, "`webhook` and `command`"),
        ("notify:\n  a:\n    webhook: canary", 4, "no address"),
        ("notify:\n  a:\n    webhook: ftp://canary/x", 4, "no address"),
        ("notify:\n  a: {command: [x], headers: {Authorization: canary}}", 3, "no headers"),
        ("notify:\n  a: {webhook: 'https://x/y', headers: {Auth: \"canary\\nX: y\"}}", 3, "no header"),
        ("notify:\n  a: {command: [x], format: ntfy}", 3, "kind of request"),
        ("notify:\n  a: {command: [x], severity: fatal}", 3, "critical"),
        ("notify:\n  'A b': {command: [x]}", 3, "not allowed"),
        ("metrics: {}", 2, "port"),
        ("metrics: {port: 70000}", 2, "port"),
        (
            "metrics: {port: 9464}\nendpoints:\n  e: {model: m, port: 9464}",
            2,
            'port 9464 is already taken by endpoint "e"',
        ),
    ],
)
def test_what_cannot_be_is_told_at_its_place_without_a_secret(text: str, line: int, message: str) -> None:
    with pytest.raises(SpecError) as raised:
        read(text)
    (problem,) = raised.value.problems
    assert problem.line == line
    assert message in f"{problem.message} {problem.hint}"
    assert "canary" not in str(raised.value)

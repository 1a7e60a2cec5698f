"""`notify` of the set points, resolved."""

from __future__ import annotations

from collections.abc import Mapping

from reconciler.spec.endpoints import absolute
from reconciler.spec.findings import Findings
from reconciler.spec.models import NotifierModel
from reconciler.spec.spec import Notifier
from reconciler.spec.tree import Map, locate

_WAYS = ("webhook", "webhook_file", "command")


def notifiers(models: Mapping[str, NotifierModel], text: Map, findings: Findings) -> dict[str, Notifier]:
    """The notifiers by name; what is wrong with them goes to the findings, without an address or a header.

    Wrong are no way to tell or several, and a command with what only a request has.
    """
    found: dict[str, Notifier] = {}
    for name, model in sorted(models.items()):
        at = locate(text, ("notify", name), key=True)
        if not findings.check_name(at, "notifier", name):
            continue
        ways = [way for way in _WAYS if getattr(model, way) is not None]
        if len(ways) != 1:
            written = " and ".join(f"`{way}`" for way in ways) or "no way to tell it"
            findings.add(at, f'notifier "{name}" has {written}', "write one of `webhook`, `webhook_file`, `command`")
            continue
        if model.command is not None and model.headers:
            place = locate(text, ("notify", name, "headers"), key=True)
            findings.add(place, f'notifier "{name}" is a command, which has no headers', "remove `headers`")
        if model.command is not None and model.format == "ntfy":
            place = locate(text, ("notify", name, "format"), key=True)
            findings.add(place, f'notifier "{name}" is a command, and `ntfy` is a kind of request', "use json or slack")
        found[name] = Notifier(
            name=name,
            severity=model.severity,
            format=model.format,
            webhook=model.webhook,
            webhook_file=None if model.webhook_file is None else absolute(model.webhook_file, at),
            command=model.command,
            headers=model.headers,
            source=at,
        )
    return found

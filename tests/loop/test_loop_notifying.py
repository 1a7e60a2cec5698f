"""Notifiers are kept up to date beside the loop: never waited for, never told twice, never forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant, SystemClock
from reconciler.errors import ActError
from reconciler.health.incident import Incident
from reconciler.health.notices import Notice
from reconciler.journal.journal import Journal
from reconciler.loop import notifying
from reconciler.loop.notifying import Notifying
from reconciler.spec.load import SourceText, resolve
from reconciler.spec.spec import Notifier, Spec

SPEC = """\
version: 1
endpoints: {}
notify:
  phone: {webhook: "https://ntfy.example/box", format: ntfy}
"""


def spec(text: str = SPEC) -> Spec:
    return resolve(SourceText("setpoints.yaml", text), (), hostname="box", read_env_file=lambda _: b"")


def incident(name: str = "chat", severity: str = "critical") -> Incident:
    at = Instant(1_764_000_000.0, 5000.0)
    return Incident(f"Unplanned/{name}@1", "Unplanned", name, severity, "away", "open", at, at.wall, at.wall)


@dataclass
class Post:
    """A stand-in for the way out: what went, how many at once, and what happens to it."""

    sent: list[list[tuple[str, str]]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fails: bool = False

    async def __call__(self, notifier: Notifier, notices: Sequence[Notice]) -> None:
        self.sent.append([(n.change, n.incident.subject) for n in notices])
        await self.gate.wait()
        if self.fails:
            raise ActError("ntfy.example answered with status 500")


@pytest.fixture(autouse=True)
def no_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifying, "GATHER_S", 0.0)


@dataclass
class Desk:
    journal: Journal
    post: Post
    now: float = 1000.0

    def __post_init__(self) -> None:
        desk = self

        class Clock(SystemClock):
            def now(self) -> Instant:
                return Instant(1_764_000_000.0 + desk.now, desk.now)

        self.wakes = 0
        self.notifying = Notifying(self.journal, Clock(), deliver=self.post, wake=self.woken)

    def woken(self) -> None:
        self.wakes += 1

    async def look(self, *incidents: Incident, of: Spec | None = None) -> None:
        """One tick: the incidents are on record, and are offered; then everything that can go on does."""
        self.journal.save_incidents(incidents)
        self.notifying.offer(of or spec(), [i for i in incidents if i.state != "resolved"])
        for _ in range(10):
            await asyncio.sleep(0)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.journal.events()]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.open(tmp_path / "journal.db", SystemClock())


def test_a_slow_delivery_holds_up_nobody_and_what_comes_meanwhile_follows(journal: Journal) -> None:
    async def story() -> None:
        desk = Desk(journal, Post())
        await desk.look(incident("a"))
        await desk.look(incident("a"), incident("b"))
        await desk.look(incident("a"), incident("b"), incident("c"))
        assert desk.post.sent == [[("opened", "a")]]  # one at a time, and the loop went on
        desk.post.gate.set()
        await asyncio.sleep(0.01)
        assert desk.wakes == 1  # the end of it has the loop look again
        await desk.look(incident("a"), incident("b"), incident("c"))
        assert desk.post.sent[1:] == [[("opened", "b"), ("opened", "c")]]

    asyncio.run(story())


def test_what_was_told_is_known_to_the_next_daemon_and_its_end_is_told(journal: Journal, tmp_path: Path) -> None:
    async def first() -> None:
        desk = Desk(journal, Post())
        desk.post.gate.set()
        await desk.look(incident())

    async def second() -> None:
        desk = Desk(Journal.open(tmp_path / "journal.db", SystemClock()), Post())
        desk.post.gate.set()
        await desk.look(incident())
        assert desk.post.sent == []
        await desk.look(replace(incident(), state="resolved", resolved_at=1_764_000_400.0))
        assert desk.post.sent == [[("resolved", "chat")]]
        await desk.look()
        assert len(desk.post.sent) == 1

    asyncio.run(first())
    journal.close()
    asyncio.run(second())


def test_a_delivery_cut_short_by_the_end_of_the_daemon_is_due_to_the_next(journal: Journal) -> None:
    async def story() -> None:
        desk = Desk(journal, Post())
        await desk.look(incident())
        await desk.notifying.close()
        assert journal.told("phone") == {}

    asyncio.run(story())


def test_one_that_cannot_be_told_is_an_event_once_and_tried_again_after_a_pause(journal: Journal) -> None:
    async def story() -> None:
        desk = Desk(journal, Post(fails=True))
        desk.post.gate.set()
        await desk.look(incident())
        await desk.look(incident())
        assert len(desk.post.sent) == 1
        assert desk.notifying.next_retry() == 1000.0 + notifying.PAUSE_S
        desk.now += notifying.PAUSE_S
        await desk.look(incident())
        assert len(desk.post.sent) == 2
        assert desk.kinds() == ["NotificationFailed"]
        assert desk.notifying.failures == {"phone": 2}
        desk.now += notifying.PAUSE_S
        desk.post.fails = False
        await desk.look(incident())
        assert desk.kinds() == ["NotificationFailed", "NotificationsBack"]
        assert set(journal.told("phone")) == {incident().id}

    asyncio.run(story())


def test_one_that_the_next_daemon_cannot_tell_either_is_no_event_again_until_it_could_be_told(
    journal: Journal, tmp_path: Path
) -> None:
    async def story(post: Post) -> list[str]:
        with Journal.open(tmp_path / "journal.db", SystemClock()) as own:
            desk = Desk(own, post)
            desk.post.gate.set()
            await desk.look(incident())
            assert len(desk.post.sent) == 1
            return desk.kinds()

    journal.close()
    assert asyncio.run(story(Post(fails=True))) == ["NotificationFailed"]
    assert asyncio.run(story(Post(fails=True))) == ["NotificationFailed"]
    assert asyncio.run(story(Post())) == ["NotificationFailed", "NotificationsBack"]
    with Journal.open(tmp_path / "journal.db", SystemClock()) as own:
        own.save_told("phone", {})
    assert asyncio.run(story(Post(fails=True)))[2:] == ["NotificationFailed"]


def test_an_incident_that_is_over_before_it_could_be_told_is_never_told(journal: Journal) -> None:
    async def story() -> None:
        desk = Desk(journal, Post(fails=True))
        desk.post.gate.set()
        await desk.look(incident())
        desk.post.fails, desk.now = False, desk.now + notifying.PAUSE_S
        await desk.look(replace(incident(), state="resolved", resolved_at=1.0))
        await desk.look()
        assert len(desk.post.sent) == 1

    asyncio.run(story())


def test_an_incident_that_is_over_while_others_are_gathered_is_never_told(journal: Journal) -> None:
    async def story() -> None:
        desk = Desk(journal, Post())
        desk.journal.save_incidents([incident()])
        desk.notifying.offer(spec(), [incident()])
        await desk.look(replace(incident(), state="resolved", resolved_at=1.0))
        assert desk.wakes == 1
        assert desk.post.sent == []
        assert journal.told("phone") == {}

    asyncio.run(story())


def test_one_that_is_taken_out_of_the_files_is_not_tried_again_and_begins_anew_if_it_returns(
    journal: Journal,
) -> None:
    async def story() -> None:
        desk = Desk(journal, Post(fails=True))
        desk.post.gate.set()
        await desk.look(incident())
        assert desk.notifying.next_retry() is not None
        await desk.look(incident(), of=spec("version: 1\nendpoints: {}\n"))
        assert desk.notifying.next_retry() is None
        await desk.look(incident())
        assert len(desk.post.sent) == 2, "the pause was that of the old one"

    asyncio.run(story())


def test_nobody_is_told_what_is_below_their_severity(journal: Journal) -> None:
    async def story() -> None:
        desk = Desk(journal, Post())
        desk.post.gate.set()
        strict = spec(SPEC.replace("format: ntfy", "format: ntfy, severity: critical"))
        await desk.look(incident(severity="warning"), of=strict)
        assert desk.post.sent == []
        await desk.look(incident(severity="critical"), of=strict)
        assert desk.post.sent == [[("opened", "chat")]]

    asyncio.run(story())


def test_records_that_cannot_be_read_count_as_not_told(journal: Journal) -> None:
    journal.save_told("phone", {incident().id: incident()})
    assert set(journal.told("phone")) == {incident().id}
    journal._set_meta("told:phone", '["{\\"id\\": 3}"]')
    assert journal.told("phone") == {}

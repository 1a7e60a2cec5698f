"""The journal's contents: what is committed is there, what did not change is not written, what is old goes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.clock import Instant, SystemClock
from reconciler.errors import StateError
from reconciler.health.incident import Incident
from reconciler.journal import journal as journal_module
from reconciler.journal.journal import Journal
from reconciler.journal.reader import Texts, read_agenda
from reconciler.journal.timings import KEPT_PER_KEY, p95
from reconciler.plan.actions import Event
from reconciler.plan.ledger import (
    AgendaEntry,
    EndpointRecord,
    Exit,
    Lease,
    Ledger,
    OverlayRecord,
    Quarantine,
    Strangers,
    Timings,
)
from reconciler.plan.observed import Subject
from reconciler.spec.spec import Source

NOW = Instant(1_764_000_000.25, 1000.5)


def event(subject: str = "thinking", kind: str = "healthy") -> Event:
    return Event(kind, subject, f"{subject} is {kind}", "setpoint")


def lease(gpu: str) -> Lease:
    there = Strangers(((70, 10 << 30), (71, 1 << 30)), 5 << 20)
    return Lease("render", Subject("workload", "render"), gpu, 16 << 30, exclusive=False, since=NOW, strangers=there)


def overlay(name: str = "render") -> OverlayRecord:
    return OverlayRecord(
        name, "active", NOW, NOW.wall, "hash", 600, Source("overlays/render.yaml", 3, 1), gpus=("GPU-4",),
        evicted=("interpretable",), active_since=NOW,
    )  # fmt: skip


def endpoint(name: str) -> EndpointRecord:
    return EndpointRecord(name, exits=(Exit("i-1", NOW, -9, planned=False),), ready_since=NOW, last_gpus=("GPU-0",))


def entry(name: str) -> AgendaEntry:
    return AgendaEntry(name, ("stopping", "stopped"), NOW.wall, NOW.wall + 60, "gives way to render", "render")


LEDGER = Ledger(
    boot_id="boot-1",
    overlays={"render": overlay()},
    leases=tuple(lease(f"GPU-{n}") for n in (9, 10, 1)),
    endpoints={name: endpoint(name) for name in ("thinking", "interpretable", "coding")},
    quarantines={"GPU-5": Quarantine("GPU-5", NOW, "memory not returned")},
    agenda=(entry("z"), entry("a")),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path, SystemClock()) as opened:
        yield opened


def reopened(journal: Journal) -> Journal:
    journal.close()
    return Journal.open(journal.path, SystemClock())


def written_rows(journal: Journal) -> int:
    return journal._connection.total_changes


# ---------------------------------------------------------------- the ledger


def test_a_committed_ledger_is_the_same_for_writer_reader_and_the_next_daemon(journal: Journal) -> None:
    journal.commit(LEDGER, [event()], NOW)
    assert journal.ledger() == LEDGER
    with Journal.open_readonly(journal.path) as reader:
        assert reader.ledger() == LEDGER
    with reopened(journal) as again:
        assert again.ledger() == LEDGER


def test_what_left_the_ledger_leaves_the_file(journal: Journal) -> None:
    journal.commit(LEDGER, [], NOW)
    smaller = replace(LEDGER, overlays={}, leases=LEDGER.leases[1:], quarantines={}, agenda=(), boot_id="boot-2")
    journal.commit(smaller, [], NOW)
    with reopened(journal) as again:
        assert again.ledger() == smaller
        assert again._connection.execute("SELECT count(*) FROM records").fetchone() == (5,)


def test_the_order_of_more_leases_than_nine_is_kept(journal: Journal) -> None:
    many = replace(LEDGER, leases=tuple(lease(f"GPU-{n}") for n in range(120, 0, -1)))
    journal.commit(many, [], NOW)
    with reopened(journal) as again:
        assert again.ledger() == many


def test_an_unchanged_ledger_writes_nothing(journal: Journal) -> None:
    journal.commit(LEDGER, [event()], NOW)
    before, log = written_rows(journal), journal.path.with_name("journal.sqlite-wal").stat()
    for _ in range(10):
        journal.commit(replace(LEDGER, endpoints={n: endpoint(n) for n in reversed(LEDGER.endpoints)}), [], NOW)
        journal.save_incidents(())
    after = journal.path.with_name("journal.sqlite-wal").stat()
    assert written_rows(journal) == before
    assert (after.st_size, after.st_mtime_ns) == (log.st_size, log.st_mtime_ns)


def test_of_incidents_that_go_on_nothing_is_read_or_written_at_each_look(journal: Journal) -> None:
    one, over = incident(1), incident(2, resolved_at=NOW.wall)
    journal.save_incidents([one, over])
    said: list[str] = []
    journal._connection.set_trace_callback(said.append)
    for _ in range(3):
        assert journal.incidents() == (one,)
        journal.save_incidents([one])
    assert said == []
    journal._connection.set_trace_callback(None)
    ended = replace(one, resolved_at=NOW.wall)
    journal.save_incidents([ended])
    assert journal.incidents() == ()
    with reopened(journal) as again:
        assert again.incidents() == ()
        assert set(again.incidents(include_resolved=True)) == {ended, over}


def test_only_the_record_that_changed_is_written(journal: Journal) -> None:
    journal.commit(LEDGER, [], NOW)
    before = written_rows(journal)
    changed = {**LEDGER.endpoints, "coding": replace(endpoint("coding"), streak=2)}
    journal.commit(replace(LEDGER, endpoints=changed), [], NOW)
    assert written_rows(journal) - before == 1


def test_predictions_are_not_part_of_what_is_committed(journal: Journal) -> None:
    journal.commit(replace(LEDGER, timings={"thinking": Timings(40.0, 5.0, 1.0)}), [], NOW)
    assert journal.ledger() == LEDGER


def test_the_agenda_is_read_without_a_daemon_and_without_pydantic(journal: Journal) -> None:
    journal.commit(LEDGER, [], NOW)
    assert read_agenda(journal.path) == LEDGER.agenda
    code = """
        import sys
        from pathlib import Path
        from reconciler.journal.reader import read_agenda
        entries = read_agenda(Path(sys.argv[1]))
        assert [entry.endpoint for entry in entries] == ["z", "a"]
        heavy = {"pydantic", "yaml", "httpx", "psutil", "rich", "typer"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(journal.path)], check=True, timeout=60)


def test_reading_the_agenda_where_no_daemon_ever_ran_finds_none(path: Path) -> None:
    assert read_agenda(path) == ()


def test_each_opening_as_writer_is_a_new_generation_and_reading_is_not(path: Path) -> None:
    for expected in (1, 2, 3):
        with Journal.open(path, SystemClock()) as journal:
            assert journal.generation() == expected
        with Journal.open_readonly(path) as reader:
            assert reader.generation() == expected


# ---------------------------------------------------------------- events


def test_events_keep_their_order_and_are_found_by_subject_and_kind(journal: Journal) -> None:
    journal.commit(LEDGER, [event("a"), event("b"), event("a", "stopped")], NOW)
    journal.append([event("b", "exit")], NOW.plus(1), data={"exit_code": -9, "gpus": ["GPU-1"]})
    assert journal.last_event_id() == 4
    assert [(e.id, e.subject, e.kind) for e in journal.events()] == [
        (1, "a", "healthy"),
        (2, "b", "healthy"),
        (3, "a", "stopped"),
        (4, "b", "exit"),
    ]
    assert [e.id for e in journal.events(subject="a")] == [1, 3]
    assert [e.id for e in journal.events(kind="healthy")] == [1, 2]
    assert [e.id for e in journal.events(subject="b", kind="exit")] == [4]
    assert [e.id for e in journal.events(after_id=2)] == [3, 4]
    assert [e.id for e in journal.events(limit=2)] == [1, 2]
    assert [e.id for e in journal.events(limit=2, newest=True)] == [3, 4]
    assert [e.id for e in journal.events(subject="a", limit=1, newest=True)] == [3]
    told = journal.events(after_id=3)[0]
    assert (told.wall, told.data, told.cause) == (NOW.wall + 1, {"exit_code": -9, "gpus": ["GPU-1"]}, "setpoint")


def test_text_that_is_no_unicode_is_kept_legibly(journal: Journal) -> None:
    odd = "train-\udcff.py \x00"  # a foreign command line, as os.fsdecode gives it
    journal.append([Event("foreign", odd, odd, odd)], NOW)
    assert journal.events()[0].message == "train-\\udcff.py \x00"
    assert len(journal.events(subject=odd)) == 1
    named = replace(LEDGER, overlays={odd: overlay(odd)})  # an overlay is named by its file's stem
    journal.commit(named, [], NOW)
    journal.save_texts({odd: "version: 1"}, "digest")
    with reopened(journal) as again:
        assert again.ledger() == named


def test_old_events_go_and_ids_are_never_used_twice(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "EVENTS_KEPT", 50)
    monkeypatch.setattr(journal_module, "PRUNE_EVERY", 10)
    for number in range(200):
        journal.append([event(str(number))], NOW)
    kept = journal.events()
    assert 50 <= len(kept) < 60
    assert kept[-1].id == 200
    journal._connection.execute("DELETE FROM events")
    journal.append([event()], NOW)
    assert journal.last_event_id() == 201


def test_events_and_ledger_are_committed_together_or_not_at_all(journal: Journal) -> None:
    journal.commit(LEDGER, [event()], NOW)
    journal._connection.execute(
        "CREATE TEMP TRIGGER no BEFORE INSERT ON main.events WHEN new.kind = 'cursed'"
        " BEGIN SELECT RAISE(ABORT, 'cursed'); END"
    )
    with pytest.raises(StateError, match="cannot write the journal: cursed"):
        journal.commit(Ledger(boot_id="boot-2"), [event(), event(kind="cursed")], NOW)
    assert journal.ledger() == LEDGER
    with reopened(journal) as again:
        assert again.ledger() == LEDGER
        assert again.last_event_id() == 1
        again.commit(Ledger(boot_id="boot-2"), [], NOW)
        assert again.ledger() == Ledger(boot_id="boot-2")


# ---------------------------------------------------------------- incidents, texts, timings


def incident(number: int = 1, **changes: object) -> Incident:
    made = Incident(
        f"Unplanned/e{number}@{number}", "Unplanned", f"e{number}", "warning", "it ended", "open", NOW,
        opened=float(number), last_seen=float(number),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_incidents_are_kept_by_id_and_resolved_ones_shown_on_request(journal: Journal) -> None:
    journal.save_incidents([incident(2), incident(1)])
    assert journal.incidents() == (incident(1), incident(2))
    resolved = incident(1, state="resolved", resolved_at=9.0)
    journal.save_incidents([resolved])
    with reopened(journal) as again:
        assert again.incidents() == (incident(2),)
        assert again.incidents(include_resolved=True) == (resolved, incident(2))


def test_an_unchanged_incident_is_not_written_again(journal: Journal) -> None:
    journal.save_incidents([incident(1), incident(2)])
    before = written_rows(journal)
    journal.save_incidents([incident(1), incident(2)])
    assert written_rows(journal) == before
    journal.save_incidents([incident(1), incident(2, count=2)])
    assert written_rows(journal) == before + 1


def test_only_the_oldest_resolved_incidents_go(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "RESOLVED_KEPT", 2)
    journal.save_incidents([incident(0)])
    for number in range(1, 5):
        journal.save_incidents([incident(number, state="resolved", resolved_at=float(number))])
    assert [i.subject for i in journal.incidents(include_resolved=True)] == ["e0", "e3", "e4"]


def test_the_texts_in_force_are_replaced_as_a_whole(journal: Journal) -> None:
    journal.save_texts({"/etc/setpoints.yaml": "version: 1\n", "/etc/overlays/a.yaml": "# ä\n"}, "digest-1")
    journal.save_texts({"/etc/setpoints.yaml": "version: 1\nendpoints: {}\n"}, "digest-2")
    before = written_rows(journal)
    journal.save_texts({"/etc/setpoints.yaml": "version: 1\nendpoints: {}\n"}, "digest-2")
    assert written_rows(journal) == before, "the same texts are not written again"
    with reopened(journal) as again:
        assert again.texts() == Texts({"/etc/setpoints.yaml": "version: 1\nendpoints: {}\n"}, "digest-2")


def test_measurements_are_bounded_per_subject_and_measure(journal: Journal) -> None:
    for number in range(KEPT_PER_KEY + 20):
        journal.record_timing("thinking", "load", float(number))
    journal.record_timing("thinking", "stop", 1.5)
    before = journal.timings()
    assert journal.timings() is before, "the same object until something more is measured"
    journal.record_timing("render", "run", 300.0)
    with reopened(journal) as again:
        found = again.timings()
    assert found["thinking", "load"] == tuple(float(n) for n in range(20, KEPT_PER_KEY + 20))
    assert found["thinking", "stop"] == (1.5,)
    assert found["render", "run"] == (300.0,)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ((), None),
        ((7.0,), 7.0),
        ((2.0, 1.0), 2.0),
        (tuple(map(float, range(1, 101))), 95.0),
        ((1.0,) * 20 + (9.0,), 1.0),
    ],
)
def test_the_95th_percentile_is_by_nearest_rank(samples: tuple[float, ...], expected: float | None) -> None:
    assert p95(samples) == expected


# ---------------------------------------------------------------- full disks


def test_a_full_disk_is_an_error_that_changes_nothing_and_passes(journal: Journal) -> None:
    journal.commit(LEDGER, [event()], NOW)
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = replace(LEDGER, boot_id="x" * 200_000)
    with pytest.raises(StateError) as caught:
        journal.commit(large, [event()], NOW)
    assert "journal.sqlite: cannot write the journal: database or disk is full" in str(caught.value)
    assert "hint: free space" in str(caught.value)
    assert journal.ledger() == LEDGER
    assert journal.last_event_id() == 1
    journal._connection.execute("PRAGMA max_page_count = 1000000")
    journal.commit(large, [event()], NOW)
    assert journal.ledger() == large


def test_a_write_that_the_file_system_refuses_is_an_error_and_the_last_commit_stays(path: Path) -> None:
    """A limit on file sizes (RLIMIT_FSIZE) makes write(2) fail with EFBIG, as a quota does."""
    code = """
        import resource, signal, sys
        from msgspec.structs import replace
        from pathlib import Path
        from reconciler.clock import Instant, SystemClock
        from reconciler.errors import StateError
        from reconciler.journal.journal import Journal
        from reconciler.plan.ledger import Ledger
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        now = Instant(1.0, 1.0)
        journal = Journal.open(Path(sys.argv[1]), SystemClock())
        journal.commit(Ledger(boot_id="before"), [], now)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            journal.commit(Ledger(boot_id="x" * 400_000), [], now)
        except StateError as error:
            print(error)
        assert journal.ledger().boot_id == "before"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.commit(Ledger(boot_id="after"), [], now)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], check=True, timeout=60, capture_output=True, text=True
    )
    assert "journal.sqlite: cannot write the journal: " in done.stdout
    assert "hint: " in done.stdout
    with Journal.open(path, SystemClock()) as journal:
        assert journal.notice is None
        assert journal.ledger().boot_id == "after"


def test_what_is_decided_of_overlays_reaches_the_disk_before_it_is_acted_on_and_all_else_with_it(
    journal: Journal,
) -> None:
    said: list[str] = []
    journal._connection.set_trace_callback(said.append)

    def synced(ledger: Ledger) -> bool:
        said.clear()
        journal.commit(ledger, [event()], NOW)
        commit = said.index("COMMIT")
        assert journal._connection.execute("PRAGMA synchronous").fetchone() == (1,), "NORMAL for what comes next"
        return "PRAGMA synchronous = FULL" in said[:commit]

    one = Ledger(boot_id="boot", endpoints={"a": endpoint("a")})
    assert not synced(one)
    begun = replace(one, overlays={"render": overlay()})
    assert synced(begun)
    assert not synced(replace(begun, endpoints={}))
    assert synced(replace(begun, overlays={"render": replace(overlay(), state="completing")}))
    assert synced(one), "that it is over"


def test_a_decision_about_overlays_that_cannot_be_written_leaves_the_journal_as_quick_as_before(
    journal: Journal,
) -> None:
    journal._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StateError):
        journal.commit(Ledger(boot_id="boot", overlays={"render": overlay()}), [], NOW)
    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (1,)

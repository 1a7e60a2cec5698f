"""kill -9 at any moment: what was acknowledged is there, and nothing is half there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from reconciler.clock import SystemClock
from reconciler.journal.journal import Journal

KILLS = 12

WRITER = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from reconciler.clock import Instant, SystemClock
    from reconciler.journal.journal import Journal
    from reconciler.plan.actions import Event
    from reconciler.plan.ledger import EndpointRecord, Ledger, Quarantine

    journal = Journal.open(Path(sys.argv[1]), SystemClock())
    number = journal.ledger().endpoints["a"].streak if journal.ledger().endpoints else 0
    while True:
        number += 1
        now = Instant(float(number), float(number))
        ledger = Ledger(
            boot_id=str(number),
            endpoints={name: EndpointRecord(name, streak=number, failed="x" * 2000) for name in "abc"},
            quarantines={f"GPU-{number % 7}": Quarantine(f"GPU-{number % 7}", now, str(number))},
        )
        journal.commit(ledger, [Event("tick", "a", str(number), "c"), Event("tick", "b", str(number), "c")], now)
        os.write(1, b"%d\\n" % number)
""")


def run_until_killed(path: Path, acknowledgements: int, delay_s: float) -> int:
    """Start a writer, let it commit so often and a little longer, kill it; the last number it acknowledged."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        for _ in range(acknowledgements):
            assert writer.stdout.readline(), "the writer ended by itself"
        # not a wait for anything: it moves the kill to a random place inside a commit
        signal.sigtimedwait([], delay_s)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    said = writer.stdout.read().split(b"\n")
    return max((int(line) for line in said if line), default=0)


def test_a_writer_killed_at_any_moment_loses_no_acknowledged_commit_and_leaves_no_half(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for kill in range(KILLS):
        acknowledged = run_until_killed(path, chance.randrange(1, 40), chance.random() * 0.01)
        with Journal.open(path, SystemClock()) as journal:
            context = f"seed {seed}, kill {kill}"
            assert journal.notice is None, context
            assert journal._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",), context
            ledger = journal.ledger()
            number = int(ledger.boot_id)
            assert number >= acknowledged, context
            assert [record.streak for record in ledger.endpoints.values()] == [number] * 3, context
            assert [q.reason for q in ledger.quarantines.values()] == [str(number)], context
            assert [e.message for e in journal.events(limit=2, newest=True)] == [str(number)] * 2, context
            assert journal.last_event_id() == 2 * number, context


def test_a_writer_killed_while_it_makes_its_first_journal_leaves_none_or_a_sound_one(tmp_path: Path) -> None:
    code = """
        import os, signal, sqlite3, sys
        from pathlib import Path
        from reconciler.clock import SystemClock
        from reconciler.journal import database
        from reconciler.journal.journal import Journal

        class Dying(sqlite3.Connection):
            left = int(sys.argv[2])
            def execute(self, *args):
                if Dying.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                Dying.left -= 1
                return super().execute(*args)

        connect = sqlite3.connect
        sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Dying, **kwargs)
        Journal.open(Path(sys.argv[1]), SystemClock()).close()
        print("done")
    """
    statements, done = 0, False
    while not done:
        path = tmp_path / str(statements) / "journal.sqlite"
        path.parent.mkdir()
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(path), str(statements)],
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        done = run.stdout == b"done\n"
        assert done or run.returncode == -signal.SIGKILL, run.stderr
        with Journal.open(path, SystemClock()) as journal:
            assert journal.notice is None, f"killed before statement {statements}"
        statements += 4 if not done else 0
    assert statements > 20

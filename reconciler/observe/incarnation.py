"""From the records of one incarnation and the process table to what it is now: its phase, and who of it lives."""

from __future__ import annotations

import os
import time
from functools import cache

from msgspec import Struct, field

from reconciler import cgroup
from reconciler.census import members
from reconciler.clock import Clock, Instant
from reconciler.identity import boot_id, is_alive
from reconciler.journal.incarnations import Exit, Intent, Records, Run, StopRecord, is_over, lock_path
from reconciler.journal.layout import StateDir, is_locked
from reconciler.observe.records import RecordCache
from reconciler.plan.observed import Incarnation, Phase, StopProgress, Subject

EXIT_RECORD_WAIT_S = 0.25
"""The shim writes the exit record some 10 ms after the leader's end, which wakes the loop at once: waiting that long
beats reporting `unknown` and looking again."""
_EXIT_RECORD_PAUSES_S = (0.0002, 0.005)
"""Between two looks for it, the first and the longest; they double. It is there within 1 ms where fsync is quick."""
SWEEP_EVERY_S = 2.0
"""Without a shim, who descends from a dead leader is told only by a sweep of /proc: some 10 ms for 500 processes."""


class _Memory(Struct):
    """What is remembered of one incarnation between two looks."""

    never_started: bool = False
    over: bool = False
    """Its leader, its shim and every member are gone: nothing can come back."""
    waited: bool = False
    """Its exit record was waited for once."""
    lived_until: Instant | None = None
    """The last look, after its leader had ended, at which others of it were seen, or it could not be told."""
    swept: Instant | None = None
    strays: dict[int, int] = field(default_factory=dict)
    """pid → start ticks, as of the last sweep."""


class IncarnationReader:
    """Decides phases. Costs one stat and one read of /proc per running incarnation."""

    def __init__(self, state: StateDir, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._records = RecordCache(state)
        self._memories: dict[str, _Memory] = {}
        self._by_id: dict[str, Records] = {}

    def read(self) -> tuple[tuple[Incarnation, Records], ...]:
        """Every incarnation in `run/` with its records, sorted by subject, then start.

        Raises:
            StateError: `run/` cannot be listed.
        """
        self._by_id = {records.id: records for records in self._records.current()}
        self._memories = {i: self._memories.get(i, _Memory()) for i in self._by_id}
        seen = [self._look(records) for records in tuple(self._by_id.values())]
        return tuple(sorted(seen, key=lambda pair: (pair[0].subject, pair[0].started.wall, pair[0].id)))

    def _look(self, records: Records) -> tuple[Incarnation, Records]:
        memory = self._memories[records.id]
        phase, records = self._phase(records, memory)
        strays = self._strays(records, memory, phase)
        if phase in ("exited", "vanished") and strays != ():
            memory.lived_until = self._clock.now()
        return _incarnation(records, phase, strays, memory.lived_until), records

    def _phase(self, records: Records, memory: _Memory) -> tuple[Phase, Records]:
        """The phase, and the records it was decided on (read again where the decision hung on it).

        1. It is of another boot, whatever of it can still be read → exited if its exit is recorded, else vanished.
        2. A record is unreadable → unknown. 3. Its exit is recorded → exited.
        4. No run record: lock held → intent, lock free → vanished (never started).
        5. Its pids mean nothing in our pid namespace, or are of another boot than its intent: its lock held → unknown,
           free (a container was started anew) → vanished. The leader lives → running; could not be told → unknown.
        6. The leader is gone: exit recorded meanwhile → exited; the shim lives and will record it → unknown; else
           vanished.
        """
        intent, run = records.intent, records.run
        if records.of_another_boot(boot_id()):  # 1
            return "exited" if isinstance(records.exit, Exit) else "vanished", records
        if records.unreadable or not isinstance(intent, Intent):  # 2
            return "unknown", records
        if isinstance(records.exit, Exit):  # 3
            return "exited", records
        if not isinstance(run, Run):  # 4
            return self._without_run(intent, records, memory)
        if _is_alien(run):  # 5
            return ("unknown" if self._is_held(intent) else "vanished"), records
        try:
            if is_alive(run.pid, run.start_ticks):  # 5
                return "running", records
            return self._without_leader(run, records, memory)
        except OSError:
            return "unknown", records

    def _is_held(self, intent: Intent) -> bool:
        """Whether somebody holds its lock on its account."""
        try:
            return is_locked(lock_path(self._state, intent.kind, intent.name)) and not self._held_by_another(intent)
        except OSError:
            return True  # not known to be free

    def _without_run(self, intent: Intent, records: Records, memory: _Memory) -> tuple[Phase, Records]:
        if memory.never_started:
            return "vanished", records
        try:
            held = is_locked(lock_path(self._state, intent.kind, intent.name)) and not self._held_by_another(intent)
        except OSError:
            return "unknown", records
        if held:
            return "intent", records
        # in this order: the shim writes the run record before it lets go of the lock, so that only now its absence
        # says that there was no shim
        records = self._records.again(records.id)
        if records.run is not None or records.exit is not None or records.unreadable:
            return self._phase(records, memory)
        memory.never_started = True
        return "vanished", records

    def _held_by_another(self, intent: Intent) -> bool:
        """Whether the subject's lock is accounted for by the living shim of a different incarnation."""
        for other in self._by_id.values():
            if other.id == intent.id or not isinstance(other.intent, Intent) or not isinstance(other.run, Run):
                continue
            same = other.intent.subject == intent.subject and other.run.boot_id == boot_id()
            if same and is_alive(other.run.shim_pid, other.run.shim_start_ticks):
                return True
        return False

    def _without_leader(self, run: Run, records: Records, memory: _Memory) -> tuple[Phase, Records]:
        wait_until = self._clock.now().plus(0.0 if memory.waited else EXIT_RECORD_WAIT_S)
        pause_s, longest_s = _EXIT_RECORD_PAUSES_S
        while True:
            # in this order: a shim that is gone has written what it will ever write
            shim_lives = is_alive(run.shim_pid, run.shim_start_ticks)
            records = self._records.again(records.id)
            if records.unreadable:
                return "unknown", records
            if isinstance(records.exit, Exit):
                return "exited", records
            if records.run is None:  # taken back: the shim was killed before its leader ran anything
                return self._phase(records, memory)
            if not shim_lives:
                return "vanished", records
            if self._clock.now().mono >= wait_until.mono:
                memory.waited = True
                return "unknown", records
            time.sleep(pause_s)  # synchronous room: nobody else's turn is taken
            pause_s = min(2 * pause_s, longest_s)

    def _strays(self, records: Records, memory: _Memory, phase: Phase) -> tuple[int, ...] | None:
        """Living members besides the leader, once it is gone; while it runs its family is no stray.

        1. Nobody to look for: never started, of another boot or a container that is gone, or over, as was seen or its
           shim says → none of them.
        2. It cannot be told: an unreadable record, alien pids, an unreadable /proc → None.
        3. The shim lives → its descendants, and who is in its control group.
        4. It is dead → that group and a sweep of /proc, at most every `SWEEP_EVERY_S`; between two, those of the last
           that still live. That nobody is left is only ever said right after a sweep.
        """
        run = records.run
        if phase in ("intent", "running") or memory.over or memory.never_started:  # 1
            return ()
        if records.of_another_boot(boot_id()):  # 1
            return ()
        if not isinstance(run, Run):
            return () if run is None and phase != "unknown" else None  # 1, 2
        if _is_alien(run):  # 1, 2
            if phase == "exited" and isinstance(records.intent, Intent):
                memory.over = not self._is_held(records.intent)
            return () if phase == "vanished" or memory.over else None
        try:
            shim_lives = is_alive(run.shim_pid, run.shim_start_ticks)
            group = records.intent.group if isinstance(records.intent, Intent) else None
            if not shim_lives and is_over(records.path) and not (group and cgroup.pids(group, records.id)):  # 1
                memory.over = True
                return ()
            if not shim_lives and memory.swept is not None:  # 4
                living = {pid: ticks for pid, ticks in memory.strays.items() if is_alive(pid, ticks)}
                if living and self._clock.now().since(memory.swept) < SWEEP_EVERY_S:
                    return tuple(sorted(living))
            found = members(  # 3, 4
                incarnation=records.id,
                pid=run.pid,
                start_ticks=run.start_ticks,
                session_id=run.session_id,
                shim_pid=run.shim_pid,
                shim_start_ticks=run.shim_start_ticks,
                group=group,
            )
        except OSError:  # 2
            return None
        if not shim_lives:
            memory.swept = self._clock.now()
            memory.strays = {stat.pid: stat.start_ticks for stat in found}
            memory.over = not found
        return tuple(stat.pid for stat in found if (stat.pid, stat.start_ticks) != (run.pid, run.start_ticks))


def _is_alien(run: Run) -> bool:
    """Whether its pids mean nothing here."""
    return run.pid_namespace != _pid_namespace() or run.boot_id != boot_id()


def _before_boot(intent: Intent, ended: Exit | None) -> tuple[Instant, Instant | None]:
    """When one of another boot was started and ended, on the monotonic clock of this one.

    That clock began anew: a moment of a boot that lasted longer would lie ahead, and whoever waits until after it (for
    memory that is seen free since) would wait for as long as that boot lasted. It ended by the start of this one.
    """
    last = max(intent.started.mono, ended.at.mono if ended else 0.0)
    started = Instant(intent.started.wall, intent.started.mono - last)
    return started, Instant(ended.at.wall, ended.at.mono - last) if ended else None


def _incarnation(
    records: Records, phase: Phase, strays: tuple[int, ...] | None, lived_until: Instant | None
) -> Incarnation:
    intent, run, ended, stop = records.intent, records.run, records.exit, records.stop
    if not isinstance(intent, Intent):
        # somebody may live behind it: shown under its id, for want of its name, rather than not at all
        intent = Intent(
            id=records.id, kind="endpoint", name=records.id, process_hash="", gpus=(), memory_bytes=(),
            exclusive=False, port=None, attempt=0, argv=(), log="", started=Instant(0.0, 0.0), boot_id="",
        )  # fmt: skip
    known_end = ended if isinstance(ended, Exit) else None
    started, exited = intent.started, known_end.at if known_end else None
    rebooted = records.of_another_boot(boot_id())
    if rebooted:
        started, exited = _before_boot(intent, known_end)
    return Incarnation(
        id=records.id,
        subject=Subject(intent.kind, intent.name),
        process_hash=intent.process_hash,
        gpus=intent.gpus,
        memory_bytes=intent.memory_bytes,
        exclusive=intent.exclusive,
        port=intent.port,
        started=started,
        phase=phase,
        pid=run.pid if isinstance(run, Run) else None,
        strays=strays,
        exit_code=ended.exit_code if isinstance(ended, Exit) else None,
        exited=exited,
        failure=ended.error if isinstance(ended, Exit) else None,
        stop=StopProgress(stop.requested, stop.drained, stop.signalled) if isinstance(stop, StopRecord) else None,
        attempt=intent.attempt,
        stop_settings=intent.stop_settings,
        questions=intent.questions,
        undying_since=records.undying.since if records.undying is not None else None,
        lived_until=lived_until,
        bygone=rebooted
        or (phase in ("exited", "vanished") and strays == () and isinstance(run, Run) and _is_alien(run)),
    )


@cache
def _pid_namespace() -> int:
    """Inode of our own pid namespace: pids of another one name other processes here."""
    return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116

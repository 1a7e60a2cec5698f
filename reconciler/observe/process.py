"""Our incarnations and everybody else: who runs, who owns a pid, who listens on a port.

psutil gives the names of users and the commands of foreign processes, and nothing else; it is imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from types import MappingProxyType

from msgspec import Struct

from reconciler import cgroup
from reconciler.census import MARKER
from reconciler.clock import Clock
from reconciler.identity import ProcStat, boot_id, descendants, is_alive, read_marker, read_stat
from reconciler.journal.incarnations import Intent, Records, Run, log_path
from reconciler.journal.layout import StateDir
from reconciler.observe.incarnation import IncarnationReader
from reconciler.observe.listeners import every_pid, holders, listening
from reconciler.observe.watches import Identity, Watches
from reconciler.plan.observed import Incarnation, PortHolder, Subject
from reconciler.spec.secrecy import redacted

_COMMAND_LENGTH = 200
_WORD_LENGTH = 1024
"""Of which secrets are looked for: a stranger's command line of 2 MB is to cost no time."""


class Description(Struct, frozen=True):
    """Who a process is, for people and for the planner."""

    owner: Subject | None
    """None: foreign."""
    user: str | None
    command: str | None
    """None: it is not in /proc (a pid of another namespace, or a dead one), or may not be seen."""


class _Known(Struct, frozen=True):
    """The incarnations of the last look, by every way a process can lead to them.

    Replaced whole, never changed, so that the threads that probe may read it at any time.
    """

    incarnations: Mapping[str, Incarnation]
    runs: Mapping[str, Run]
    identities: Mapping[Identity, str]
    """Leaders and shims → incarnation id."""
    strays: Mapping[int, str]
    sessions: Mapping[int, str]
    """Sessions whose leader is verified to be alive, so that their number is still theirs."""
    groups: Mapping[str, str]
    """Control groups: path → incarnation id."""


class ProcessReader:
    """Reads the incarnations in a state directory, and attributes processes to them."""

    def __init__(self, state: StateDir, clock: Clock) -> None:
        self._state = state
        self._reader = IncarnationReader(state, clock)
        self._watches = Watches()
        self._known = _Known({}, {}, {}, {}, {}, {})
        self._last_owner: dict[int, Subject] = {}
        self._owners: dict[Identity, str | None] = {}
        self._names: dict[Identity, tuple[str | None, str | None]] = {}
        self._listeners: dict[int, int] = {}

    def read(self) -> tuple[Incarnation, ...]:
        """Every incarnation with records in `run/`, sorted by subject, then start.

        While its leader runs an incarnation has no strays: its family is only looked at once the leader is gone.

        Raises:
            StateError: the records cannot be listed; who runs is unknown.
        """
        pairs = self._reader.read()
        runs = {i.id: r.run for i, r in pairs if isinstance(r.run, Run) and r.run.boot_id == boot_id()}
        incarnations = {i.id: i for i, _ in pairs}
        identities: dict[Identity, str] = {}
        for incarnation, run in runs.items():
            identities[run.pid, run.start_ticks] = incarnation
            identities[run.shim_pid, run.shim_start_ticks] = incarnation
        if incarnations.keys() != self._known.incarnations.keys():
            self._owners.clear()  # who was foreign may be a newcomer's
        self._known = _Known(
            incarnations=incarnations,
            runs=runs,
            identities=identities,
            strays={pid: i.id for i in incarnations.values() for pid in i.strays or ()},
            sessions={run.session_id: i for i, run in runs.items() if incarnations[i].phase == "running"},
            groups={g: i.id for i, r in pairs if i.id in runs and (g := _group_of(r)) is not None},
        )
        return tuple(incarnations.values())

    def log_tail(self, incarnation: Incarnation, limit_bytes: int) -> str:
        """The end of what an incarnation said; empty when its log cannot be read."""
        subject = incarnation.subject
        try:
            with log_path(self._state, subject.kind, subject.name, incarnation.id).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
                return file.read(limit_bytes).decode(errors="replace")
        except OSError:
            return ""

    def watches(self) -> Mapping[int, str]:
        """A pidfd → incarnation id for each living leader and shim, as of the last `read`; for the loop's selector.

        They stay this object's: do not close them. Take out of the selector, before calling again, those that are no
        longer in the answer: they are closed by the next call.
        """
        known = self._known
        wanted = {identity: i for identity, i in known.identities.items() if known.incarnations[i].alive}
        return MappingProxyType(self._watches.update(wanted))

    def close(self) -> None:
        """Close the pidfds."""
        self._watches.close()

    # ------------------------------------------------------------ attribution

    def owner_of(self, pid: int) -> Subject | None:
        """Whose process it is; None: foreign, or not to be told.

        1. A leader or shim of ours, or a known stray. 2. In the session of a living leader of ours. 3. Below one of
        those in the process tree. 4. In the control group of an incarnation of ours. 5. Started with our marker in its
        environment, naming a known incarnation.
        """
        try:
            stat = read_stat(pid)
        except OSError:
            return None
        return self._owner(stat) if stat is not None else None

    def describe(self, pid: int) -> Description:
        """Owner, user and command of `pid`.

        The driver may name a process for a while after it is gone. Such a one is still whose it was when it was last
        seen: memory of our own dead is no stranger's.
        """
        try:
            stat = read_stat(pid)
        except OSError:
            return Description(None, None, None)
        if stat is None:
            return Description(self._last_owner.get(pid), None, None)
        self._last_owner.pop(pid, None)
        if (owner := self._owner(stat)) is not None:
            self._last_owner[pid] = owner
            while len(self._last_owner) > 1024:  # the longest unseen first
                del self._last_owner[next(iter(self._last_owner))]
        identity = (pid, stat.start_ticks)
        if identity not in self._names:
            if len(self._names) > 1024:  # processes come and go for months
                self._names.clear()
            self._names[identity] = _name(pid)
        return Description(owner, *self._names[identity])

    def _owner(self, stat: ProcStat) -> Subject | None:
        identity = (stat.pid, stat.start_ticks)
        if identity not in self._owners:
            if len(self._owners) > 1024:
                self._owners.clear()
            self._owners[identity] = self._attribute(stat)
        owner = self._owners[identity]
        incarnation = self._known.incarnations.get(owner) if owner is not None else None
        return incarnation.subject if incarnation is not None else None

    def _attribute(self, stat: ProcStat) -> str | None:
        known = self._known
        ancestor: ProcStat | None = stat
        seen: set[int] = set()
        while ancestor is not None and ancestor.pid > 1 and ancestor.pid not in seen:
            seen.add(ancestor.pid)
            found = (
                known.identities.get((ancestor.pid, ancestor.start_ticks))  # 1
                or known.strays.get(ancestor.pid)
                or known.sessions.get(ancestor.session_id)  # 2
            )
            if found is not None:
                return found
            try:
                ancestor = read_stat(ancestor.parent_pid)  # 3
            except OSError:
                break
        group = cgroup.of_process(stat.pid) if known.groups else None
        while group:  # 4
            if group in known.groups:
                return known.groups[group]
            group = group.rpartition("/")[0]
        marker = read_marker(stat.pid, MARKER)  # 5
        return marker if marker in known.incarnations else None

    # ------------------------------------------------------------ ports

    def foreign_listeners(self, ports: Collection[int]) -> dict[int, PortHolder]:
        """Who else listens on each of `ports`; ports that nobody or only we listen on are left out.

        Raises:
            OSError: the kernel's tables could not be read; unknown.
        """
        return {
            port: holder
            for port, inodes in sorted(listening(ports).items())
            if (holder := self._foreign_holder(port, inodes)) is not None
        }

    def foreign_listener(self, port: int) -> PortHolder | None:
        """As `foreign_listeners`, for one port."""
        return self.foreign_listeners((port,)).get(port)

    def _foreign_holder(self, port: int, inodes: frozenset[int]) -> PortHolder | None:
        last = self._listeners.get(port)
        try:
            pid = next(holders(inodes, [last] if last is not None else []), None)
            if pid is None:
                pid = next(holders(inodes, every_pid()), None)
        except OSError:
            pid = None  # another user's: that someone listens is seen all the same
        if pid is None:
            self._listeners.pop(port, None)
            return PortHolder(port, None, None)
        self._listeners[port] = pid
        description = self.describe(pid)
        return None if description.owner is not None else PortHolder(port, pid, description.command)

    def owns_listener(self, incarnation: str, port: int) -> bool | None:
        """Whether a socket that listens on `port` belongs to this incarnation's own processes; None: not to be told.

        Two vLLM servers started on one port both stay alive, and the loser never listens (measured on 0.32): only the
        inode tells whose answer it was. Thread-safe.
        """
        run = self._known.runs.get(incarnation)
        if run is None:
            return None
        try:
            inodes = listening((port,)).get(port)
            if inodes is None or not is_alive(run.pid, run.start_ticks):
                return None  # nobody any more: the world moved between the answer and this question
            if any(True for _ in holders(inodes, (run.pid,))):
                return True  # nearly always the leader itself
            root = run.shim_pid if is_alive(run.shim_pid, run.shim_start_ticks) else run.pid
            if any(True for _ in holders(inodes, (stat.pid for stat in descendants(root)))):
                return True
            group = next((path for path, i in self._known.groups.items() if i == incarnation), None)
            return group is not None and any(True for _ in holders(inodes, cgroup.pids(group, incarnation)))
        except OSError:
            return None


def _group_of(records: Records) -> str | None:
    """The control group that is named by this incarnation and recorded as its own."""
    group = records.intent.group if isinstance(records.intent, Intent) else None
    return group if group is not None and cgroup.names(group, records.id) else None


def _name(pid: int) -> tuple[str | None, str | None]:
    """User and command line of a process, secrets left out; None for what may not be seen."""
    import psutil

    user: str | None = None
    command: str | None = None
    try:
        process = psutil.Process(pid)
        command = process.name()
        user = process.username()
        words = [word[:_WORD_LENGTH] for word in process.cmdline()[:_COMMAND_LENGTH]]
        command = " ".join(redacted(words))[:_COMMAND_LENGTH].strip() or command
    except psutil.Error:
        pass
    return user, command

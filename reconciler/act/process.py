"""Starting and ending incarnations: real processes, each under a shim of its own.

Every operation is an `ensure_*`: it reads the records and the process table afresh and decides on them, so that it may
be called again at any time, by this daemon or by the next one. What a signal rests on is recorded before it is sent.

Writing records and spawning block the event loop for some milliseconds. That is on purpose: between reading a record
and acting on it nothing else runs, so two calls for one incarnation cannot both find it unsignalled.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Mapping
from contextlib import suppress

from reconciler import census, cgroup
from reconciler.act import ports
from reconciler.act.account import Account
from reconciler.act.forkserver import ForkServer
from reconciler.act.target import Target, examine
from reconciler.act.waiting import readable_within
from reconciler.clock import Clock, Instant
from reconciler.errors import ActError, StateError, is_shortage
from reconciler.journal import incarnations
from reconciler.journal.incarnations import Exit, Intent, StopRecord, Unreadable
from reconciler.journal.layout import StateDir, is_locked, take_lock
from reconciler.plan.observed import Subject
from reconciler.spec.secrecy import Discreet, redacted
from reconciler.spec.spec import Logs, Questions, Stop

_LOCK_S = 1.0
"""How long a start waits for its subject's lock: the shim of a predecessor leaves some ms after it recorded the end."""
_CROWD_S = 10.0
"""How long a fork server may take to have room for one more order: hundreds at once are more than its socket holds."""
_START_S = 30.0
"""How long a shim may take to report; it takes some ms, and seconds on a box that swaps."""
_LINGER_S = 0.5
"""What the others get when the leader ended by itself: resource trackers unlink /dev/shm files only then."""
_LOOKS_S = (0.0002, 0.005)
"""Between two looks for that lock, or for the record of a shim that an earlier daemon spawned: first and longest, they
double. The shim of a predecessor mostly leaves in the very millisecond in which its end is seen."""


class Launch(Discreet, frozen=True):
    """One start, complete: nothing is looked up any more."""

    discreet_about = frozenset({"env"})

    incarnation: str
    subject: Subject
    process_hash: str
    gpus: tuple[str, ...]
    """UUIDs."""
    memory_bytes: tuple[int, ...]
    """On each of `gpus`."""
    exclusive: bool
    port: int | None
    """To be proven free; None: it needs none."""
    attempt: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The leader's whole environment but for the markers (`environment.child_environment`)."""
    cwd: str
    account: Account | None = None
    """None: the daemon's own user."""
    log_bytes: int = Logs().max_bytes
    """Kept of its output, a quarter more at times."""
    stop: Stop | None = None
    """How its file has it stopped; None: not said."""
    questions: Questions | None = None
    """What it is asked; None: it is no server."""


class ProcessActor:
    """Starts and ends the incarnations recorded in one state directory."""

    def __init__(
        self,
        state: StateDir,
        clock: Clock,
        boot_id: str,
        *,
        groups_in: str | None = None,
        open_files: int | None = None,
    ) -> None:
        """With `groups_in`, the control group in which each incarnation gets one of its own; None: none can be had.

        `open_files` is the soft limit of descriptors that they get; None: this process's own.
        """
        self._state = state
        self._groups_in = groups_in
        self._clock = clock
        self._boot_id = boot_id
        self._forks = ForkServer(open_files)
        self._starts: dict[str, asyncio.Future[None]] = {}
        self._go: tuple[int, int] | None = None
        """What the starts of this turn of the event loop wait for; None: there are none yet."""
        self._tidy = False
        """Drafts and control groups that earlier daemons left are cleared away."""

    # ------------------------------------------------------------ starting

    async def ensure_started(self, launch: Launch) -> None:
        """Start it, unless it was; returns once its program runs, or its end (127, 126: it could not) is recorded.

        1. It was put away already, or its process is recorded: nothing to do.
        2. Its start is under way: wait for that.
        3. Its subject's lock is held: refused, its predecessor runs or is still ending.
        4. Its port is taken: refused.
        5. Otherwise: intent, shim, record. Programs of starts in one turn of the event loop begin at its end.

        Raises:
            PortInUse: 4.
            ActError: 3, or the start failed before anything ran.
        """
        if (self._state.ended / launch.incarnation).exists():  # 1
            return
        group = cgroup.path_in(self._groups_in, launch.incarnation) if self._groups_in is not None else None
        order = _encode_order(launch, self._state, self._boot_id, group)
        deadline = self._clock.now().plus(_LOCK_S)
        pause_s, longest_s = _LOOKS_S
        while True:
            if (self._state.run / launch.incarnation).exists():  # looked for before each try: a twin call may be first
                await self._join_start(launch)
                return
            lock = self._take_lock(launch.subject)
            if lock is not None:
                break
            if self._clock.now().since(deadline) >= 0:  # 3
                raise ActError(
                    f"{launch.subject}: already running, or its predecessor is still ending",
                    hint=f"reconciler explain {launch.subject}",
                )
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)
        if self._go is None:  # of many starts only the first: there is one shim in advance
            self._forks.announce(group)
        try:
            self._record(launch, group)
            ready = await self._hand_over(launch, lock, order)
        finally:
            os.close(lock)  # the shim has its own copy
        start = asyncio.ensure_future(self._report(launch, ready))
        self._starts[launch.incarnation] = start
        start.add_done_callback(lambda done: self._forget_start(launch.incarnation, done))
        await asyncio.shield(start)

    def _forget_start(self, incarnation: str, done: asyncio.Future[None]) -> None:
        self._starts.pop(incarnation, None)
        if not done.cancelled():
            done.exception()  # seen, also when whoever asked for the start was cancelled: the records tell the rest

    async def _join_start(self, launch: Launch) -> None:
        """Outcomes 1 and 2 for an incarnation that has an intent."""
        if start := self._starts.get(launch.incarnation):
            await asyncio.shield(start)
            return
        lock = incarnations.lock_path(self._state, launch.subject.kind, launch.subject.name)
        deadline = self._clock.now().plus(_START_S)
        folder = self._state.run / launch.incarnation
        while not incarnations.is_recorded(folder):
            # an earlier daemon's shim: it has no pipe to us, so its record is looked for
            if not is_locked(lock) and not incarnations.is_recorded(folder):
                raise ActError(
                    f"{launch.subject}: incarnation {launch.incarnation} was never started; its shim is gone"
                )
            if self._clock.now().since(deadline) > 0:
                raise ActError(f"{launch.subject}: its shim has not reported for {_START_S:.0f} s")
            await self._clock.sleep(_LOOKS_S[1])

    def _take_lock(self, subject: Subject) -> int | None:
        try:
            self._state.ensure_folder(self._state.locks)
            return take_lock(incarnations.lock_path(self._state, subject.kind, subject.name))
        except (OSError, StateError) as error:
            raise ActError(f"{subject}: its lock cannot be opened: {error}") from error

    def _record(self, launch: Launch, group: str | None) -> None:
        """Port, intent, in this order, under the lock."""
        subject = launch.subject
        if launch.port is not None:
            ports.prove_free(launch.port)
        self._state.ensure_folder(self._state.logs)
        try:
            if not self._tidy:  # once: a look at all records for each of 200 starts is a look at 40,000
                incarnations.remove_drafts(self._state)
                if self._groups_in is not None:
                    cgroup.remove_forsaken(self._groups_in, {*incarnations.list_ids(self._state), launch.incarnation})
                self._tidy = True
            incarnations.write_intent(self._state, self._intent(launch, group))
        except OSError as error:
            raise ActError(f"{subject}: the intent to start it cannot be recorded: {error}") from error

    async def _hand_over(self, launch: Launch, lock: int, order: bytes) -> int:
        """The pipe that the shim will close which has this order now.

        Nothing is waited for, unless the fork server has no room for one more order.
        """
        deadline = self._clock.now().plus(_CROWD_S)
        try:
            while (ready := self._spawn_shim(lock, order)) is None:
                if self._clock.now().since(deadline) >= 0:
                    raise OSError(errno.EAGAIN, "the fork server takes no more orders")  # noqa: TRY301 - told as others are
                await self._clock.sleep(_LOOKS_S[1])
        except OSError as error:
            reason = f"its shim could not be started: {error}"
            if is_shortage(error):  # nobody took the order, and somebody may in a moment
                incarnations.remove_intent(self._state, launch.incarnation)
                raise ActError(f"{launch.subject}: {reason}") from error
            with suppress(OSError):
                incarnations.write_exit(self._state, launch.incarnation, Exit(126, self._clock.now(), reason))
            raise ActError(f"{launch.subject}: {reason}") from error
        return ready

    def _intent(self, launch: Launch, group: str | None) -> Intent:
        subject = launch.subject
        return Intent(
            id=launch.incarnation,
            kind=subject.kind,
            name=subject.name,
            process_hash=launch.process_hash,
            gpus=launch.gpus,
            memory_bytes=launch.memory_bytes,
            exclusive=launch.exclusive,
            port=launch.port,
            attempt=launch.attempt,
            argv=redacted(launch.argv),
            log=str(incarnations.log_path(self._state, subject.kind, subject.name, launch.incarnation)),
            started=self._clock.now(),
            boot_id=self._boot_id,
            group=group,
            stop_settings=launch.stop,
            questions=launch.questions,
        )

    def _spawn_shim(self, lock: int, order: bytes) -> int | None:
        """The pipe that it will close; None: the fork server has no room for one more order at the moment."""
        memory = os.memfd_create("order", os.MFD_CLOEXEC)  # no disk, and no pipe that fills up before the shim reads
        taken = False
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(order)
            os.lseek(memory, 0, os.SEEK_SET)
            go = self._go_at_the_end_of_this_turn()
            ready, report = os.pipe()
            try:
                taken = self._forks.fork_shim(memory, lock, report, go)
            finally:
                os.close(report)
                if not taken:
                    os.close(ready)
        finally:
            os.close(memory)
        return ready if taken else None

    def _go_at_the_end_of_this_turn(self) -> int:
        """A pipe that comes to its end with this turn of the event loop: all that starts in it begins at once.

        Begun one by one, the first engines would take the processors from this daemon and from the fork server, who
        have yet to start the others: beside a hundred interpreters each of the two gets a hundredth of a core.
        """
        if self._go is None:
            self._go = os.pipe()
            asyncio.get_running_loop().call_soon(self._let_go)
        return self._go[0]

    def _let_go(self) -> None:
        go, self._go = self._go, None
        for fd in go or ():
            os.close(fd)

    async def _report(self, launch: Launch, ready: int) -> None:
        """Wait until the shim closes its pipe; what it wrote there is why it failed."""
        deadline = self._clock.now().plus(_START_S)
        said = b""
        try:
            while True:
                if not await readable_within(ready, -self._clock.now().since(deadline), self._clock):
                    self._forks.kill()  # if it is that which hangs, the order and its lock end with it
                    raise ActError(f"{launch.subject}: its shim has not reported within {_START_S:.0f} s")
                chunk = os.read(ready, 4096)
                if not chunk:
                    break
                said += chunk
        finally:
            os.close(ready)
        if not incarnations.is_recorded(self._state.run / launch.incarnation):
            reason = said.decode(errors="replace") or "it was killed"
            raise ActError(f"{launch.subject}: its shim ended before it started anything: {reason}")

    # ------------------------------------------------------------ ending

    async def ensure_drain_requested(self, incarnation: str) -> None:
        """Record that its end was asked for, if it is not recorded yet.

        Raises:
            ActError: it could not be recorded.
        """
        target = examine(self._state, self._boot_id, incarnation)
        if target is not None and target.stop is None:
            self._record_stop(target, StopRecord(self._clock.now(), drained=False, signalled=None))

    async def ensure_stopped(self, incarnation: str, stop: Stop) -> None:
        """End it: one signal to the leader, grace, SIGKILL to whatever of it lives; returns when nothing does.

        To change the grace, cancel the call and call again: grace counts from the recorded moment of the signal, which
        is never sent twice. A leader that was gone before gets no stop record: its end was not asked for.

        Raises:
            NotOurs: its identity could not be proven; nothing was signalled.
            ActError: it could not be recorded (nothing was signalled), or a member may not be signalled.
        """
        target = examine(self._state, self._boot_id, incarnation)
        if target is None:
            return
        with target.leader() as leader:
            if leader is not None:
                signalled = self._signal_once(target, leader, _signal_number(stop.signal))
                end = signalled.plus(stop.grace_s)
                if await readable_within(leader, -self._clock.now().since(end), self._clock):
                    await target.linger(min(_LINGER_S, -self._clock.now().since(end)), self._clock)
            await target.kill(leader, self._clock)

    async def ensure_killed(self, incarnation: str) -> None:
        """End it at once: SIGKILL to all of it; returns when nothing of it lives.

        Raises:
            NotOurs: its identity could not be proven; nothing was signalled.
            ActError: it could not be recorded (nothing was signalled), or a member may not be signalled.
        """
        target = examine(self._state, self._boot_id, incarnation)
        if target is None:
            return
        with target.leader() as leader:
            if leader is not None:
                self._signal_once(target, leader, signal.SIGKILL)
            await target.kill(leader, self._clock)

    def _signal_once(self, target: Target, leader: int, number: signal.Signals) -> Instant:
        """Send the one stop signal, unless it was; the recorded moment of it.

        The record comes first: a crash between the two costs a polite end, the other order would cost a second signal,
        and a second SIGTERM orphans workers (vllm#44751).
        """
        now = self._clock.now()
        if isinstance(target.stop, StopRecord) and target.stop.signalled is not None:
            return target.stop.signalled
        requested = target.stop.requested if isinstance(target.stop, StopRecord) else now
        self._record_stop(target, StopRecord(requested, drained=True, signalled=now))
        if not isinstance(target.stop, Unreadable):  # else it may have been sent: count the grace, send nothing
            try:
                signal.pidfd_send_signal(leader, number)
            except ProcessLookupError:
                pass
            except OSError as error:
                raise ActError(f"pid {target.run.pid} cannot be signalled: {error.strerror}") from error
        return now

    def _record_stop(self, target: Target, record: StopRecord) -> None:
        try:
            incarnations.write_stop(self._state, target.id, record)
        except OSError as error:
            raise ActError(f"the stop of {target.id} cannot be recorded: {error}; nothing was signalled") from error

    # ------------------------------------------------------------ afterwards

    def warm(self) -> None:
        """Be ready for starts to come: without it the next one takes some 20 ms longer."""
        with suppress(OSError):  # a start will tell
            self._forks.open()

    def close(self) -> None:
        """Nothing more will be started by this one; what runs is left running."""
        self._let_go()
        self._forks.close()


def _signal_number(name: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError:
        raise ActError(f"there is no signal {name!r}", hint="SIGTERM, SIGINT, SIGQUIT…") from None


def _identity(account: Account | None) -> str:
    """As the shim reads it: user, group, then every further group; empty: as the daemon, which may be that user."""
    if account is None or account.uid == os.geteuid() != 0:
        return ""
    return " ".join(str(number) for number in (account.uid, account.gid, *account.groups))


def _encode_order(launch: Launch, state: StateDir, boot_id: str, group: str | None) -> bytes:
    """What the shim reads on stdin; the markers that prove membership are added here."""
    subject = launch.subject
    log = incarnations.log_path(state, subject.kind, subject.name, launch.incarnation)
    environment = {
        **launch.env,
        census.MARKER: launch.incarnation,
        "RECONCILER_SUBJECT": subject.name,
        "SPT_NOENV": "1",  # setproctitle would wipe the marker from /proc/PID/environ
    }
    fields = [
        *(str(state.run / launch.incarnation), boot_id, str(log), str(launch.log_bytes)),
        "1" if subject.kind == "workload" else "",
        *(group or "", launch.cwd, _identity(launch.account)),
        str(len(launch.argv)),
        *launch.argv,
        *(f"{name}={value}" for name, value in environment.items()),
    ]
    if not launch.argv or any("\0" in item for item in fields) or any("=" in name or not name for name in environment):
        raise ActError(f"{subject}: its command or environment is empty or holds what no program can be given")
    return b"\0".join(os.fsencode(item) for item in fields)

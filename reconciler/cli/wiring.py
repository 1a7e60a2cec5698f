"""The one place where real parts are put together: from options to a daemon, a look, or an answer."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from reconciler.cli.eyes import Watching, look_once, prepare_node
from reconciler.clock import Instant, SystemClock
from reconciler.errors import Problem, ReconcilerError, SpecError, UsageError
from reconciler.journal.layout import StateDir, acquire_writer, writer

if TYPE_CHECKING:
    from reconciler.health.incident import Incident
    from reconciler.journal.reader import JournalReader
    from reconciler.loop.daemon import Daemon
    from reconciler.loop.specs import SpecInForce
    from reconciler.plan.actions import Plan
    from reconciler.plan.ledger import Ledger
    from reconciler.plan.observed import Observed
    from reconciler.plan.status import DaemonInfo
    from reconciler.spec.spec import Spec

SETTLED_S = 5.0
"""After its start a daemon has loaded what it will use."""
GC_THRESHOLD = (2_000, 10, 10)
"""Of such a daemon: the garbage of its ticks is gone after some of them. `main` starts with far higher ones, and 200
restarts left 3 MiB behind; with these it is half of one."""

_M_ARENA_MAX = -8
SWITCH_S = 0.0005
"""How long one thread of it keeps others waiting at most. The interpreter's own 5 ms is what a restart takes."""


class Options(Struct, frozen=True):
    """What the command line says of where things are; None: the environment, then the defaults."""

    setpoints: Path | None = None
    state_dir: Path | None = None
    simulate: str | None = None


class Look(Struct, frozen=True):
    """One look at the box, and what would be done about it."""

    spec: Spec
    observed: Observed
    ledger: Ledger
    plan: Plan
    incidents: tuple[Incident, ...]
    daemon: DaemonInfo | None
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    """Everything wrong with the files as they are now."""


# ---------------------------------------------------------------- where things are


def setpoints_path(options: Options) -> Path:
    """The set-point file: the option, the environment, the first default that exists, or what a daemon follows.

    Raises:
        UsageError: none exists.
    """
    named = options.setpoints or _path_of("RECONCILER_SETPOINTS")
    if named is not None:
        return _absolute(named)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    folders = (Path("setpoints"), config / "reconciler", Path("/etc/reconciler"))
    places = [folder / "setpoints.yaml" for folder in folders]
    for place in places:
        if place.is_file():
            return _absolute(place)
    if (followed := followed_by_daemon(options)) is not None:
        return followed
    listed = ", ".join(str(p) for p in places)
    raise UsageError(f"no set points found (looked for {listed})", hint="name the file with --setpoints FILE")


def followed_by_daemon(options: Options) -> Path | None:
    """The set-point file that the running daemon follows; None: none runs, or it does not say."""
    try:
        answer = ask(state_dir(options), "files")
    except ReconcilerError:  # one of an earlier version, or it does not answer
        return None
    return None if answer is None else Path(answer["setpoints"])


def state_dir(options: Options) -> StateDir:
    """The state directory: the option, the environment, or the XDG state folder."""
    named = options.state_dir or _path_of("RECONCILER_STATE_DIR")
    if named is None:
        named = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "reconciler"
    return StateDir(named)


def _path_of(variable: str) -> Path | None:
    text = os.environ.get(variable)
    return Path(text) if text else None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links, and the file's folder is meant


def simulated_node(options: Options) -> str | None:
    """The simulated node that is asked for; None: the box's own driver."""
    return options.simulate or os.environ.get("RECONCILER_SIMULATE") or None


# ---------------------------------------------------------------- looking


def in_force(options: Options, *, last_good: bool) -> SpecInForce:
    """The spec as a daemon would follow it; without `last_good`, set points that it would not accept are an error."""
    from reconciler.loop.specs import SpecKeeper

    path = setpoints_path(options)
    with journal_reader(options) as journal:
        ledger, remembered = journal.ledger(), journal.texts()
    followed = SpecKeeper(path, remembered.files if remembered else {}, transform=None).load(ledger)
    if not last_good and any(p.file == str(path) for p in followed.problems):
        raise SpecError(followed.problems)
    return followed


def look(options: Options, *, at: float | None = None, last_good: bool = False) -> Look:
    """What would be done now (or, with `at`, at that epoch second) about these files, with and without a daemon.

    With `last_good`, set points that cannot be accepted are looked at as they were when they last could.

    Raises:
        SpecError: the files are wrong.
        DriverError: no daemon runs and there is no driver.
        StateError: the journal cannot be read.
    """
    from reconciler.loop.history import learn
    from reconciler.plan.planner import plan

    state = state_dir(options)
    followed = in_force(options, last_good=last_good)
    spec = followed.spec
    with journal_reader(options) as journal:
        ledger, incidents = learn(journal.ledger(), journal.timings(), spec), journal.incidents()
    answer = ask(state, "values")
    if answer is not None:
        from reconciler.health.incident import Incident
        from reconciler.journal.codec import decode
        from reconciler.plan.ledger import Ledger
        from reconciler.plan.observed import Observed
        from reconciler.plan.status import DaemonInfo

        observed = decode(Observed, answer["observed"])
        ledger = decode(Ledger, answer["ledger"])
        incidents = tuple(decode(Incident, i) for i in answer["incidents"])
        daemon: DaemonInfo | None = decode(DaemonInfo, answer["daemon"])
        notes = _elsewhere(answer.get("setpoints"), setpoints_path(options))
    else:
        environment = {**os.environ, **prepare_node(simulated_node(options), state)}
        observed, daemon, notes = look_once(state, spec, ledger, environment), None, ()
    now = SystemClock().now()
    if at is not None:
        now = Instant(at, now.mono + at - now.wall)
    decided = plan(spec, observed, ledger, now) if at is None else decide_ahead(spec, observed, ledger, now)
    return Look(spec, observed, ledger, decided, incidents, daemon, notes, followed.problems)


def _elsewhere(followed: str | None, shown: Path) -> tuple[str, ...]:
    """A note that a look is about another file than the one that the daemon follows."""
    if followed is None or same_file(Path(followed), shown):
        return ()
    return (f"note: the daemon follows {followed}; this is what {shown} would have it do",)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def decide_ahead(spec: Spec, observed: Observed, ledger: Ledger, now: Instant) -> Plan:
    """The plan at a moment to come, as if somebody had looked all the while: windows missed till then are let go."""
    from reconciler.plan.planner import plan

    decided = plan(spec, observed, ledger, now)
    gone = {name for name, record in decided.ledger.overlays.items() if record.state == "expired"}
    known = {name for name, record in ledger.overlays.items() if record.state == "expired"}
    return decided if gone <= known else plan(spec, observed, decided.ledger, now)


def status(options: Options) -> dict[str, Any]:
    """The `data` of `status`: the running daemon's answer, else what one look shows.

    Raises:
        ReconcilerError: as for `look`.
    """
    answer = ask(state_dir(options), "status")
    if answer is not None:
        return dict(answer)
    from reconciler.plan.status import status_data  # the planner and all that it knows: the daemon has them already

    seen = look(options, last_good=True)
    return status_data(seen.spec, seen.observed, seen.plan, seen.incidents, None, seen.problems)


def journal_reader(options: Options) -> JournalReader:
    """The journal, read-only; an empty one where there is none yet."""
    from reconciler.journal.reader import JournalReader

    return JournalReader.open_readonly(state_dir(options).journal)


def ask(state: StateDir, op: str, **arguments: object) -> Any:
    """One request to the daemon; None when none runs."""
    if not state.path.is_dir() or writer(state) is None:
        return None
    from reconciler.loop import control

    return control.ask(state.control_socket, op, **arguments)


# ---------------------------------------------------------------- acting


@contextmanager
def daemon(
    options: Options, transform: Callable[[Spec], Spec] | None = None, *, open_files: int | None = None
) -> Iterator[Daemon]:
    """A daemon on the state directory, which nobody else may hold.

    With `open_files` what it starts has that soft limit of descriptors, else its own.

    Raises:
        StateError: the state directory cannot be used, or another daemon holds it.
        DriverError: there is no driver.
    """
    from math import inf

    from reconciler.act.process import ProcessActor
    from reconciler.cgroup import find_home
    from reconciler.identity import boot_id

    state, clock, path = state_dir(options), SystemClock(), setpoints_path(options)
    state.ensure()
    with (
        acquire_writer(state) as held,
        closing(ProcessActor(state, clock, boot_id(), groups_in=find_home().path, open_files=open_files)) as actor,
    ):
        actor.warm()  # on another processor, while this one loads what follows

        from reconciler.act.engine import EngineActor
        from reconciler.cli.service import ServiceManager, watchdog_s
        from reconciler.journal.journal import Journal
        from reconciler.loop.daemon import Daemon
        from reconciler.loop.leftovers import Leftovers
        from reconciler.loop.parts import Parts
        from reconciler.loop.specs import SpecKeeper
        from reconciler.metrics.page import MetricsPage

        simulated = prepare_node(simulated_node(options), state)
        with closing(Journal.open(state.journal, clock)) as journal:
            remembered = journal.texts()
            yield Daemon(
                Parts(
                    state=state,
                    clock=clock,
                    journal=journal,
                    specs=SpecKeeper(path, remembered.files if remembered else {}, transform=transform),
                    actor=actor,
                    engines=EngineActor(clock),
                    eyes=lambda wake: Watching(state, wake, {**os.environ, **simulated}),
                    inherited=dict(os.environ),
                    simulated=simulated,
                    pid=os.getpid(),
                    faces=[MetricsPage(), ServiceManager(os.environ)],
                    open_files=open_files,
                    hold=held.keep,
                    leftovers=Leftovers(state, clock),
                    at_least_every_s=watchdog_s(os.environ, os.getpid()) or inf,
                )
            )


def run_daemon(options: Options, *, begun: Callable[[], None]) -> int:
    """Converge until SIGTERM or SIGINT; endpoints and workloads are left running.

    `begun` is called once the state directory is this daemon's own.

    Raises:
        ReconcilerError: it cannot start, or can no longer write.
    """
    import asyncio
    import faulthandler
    import signal

    # a loop that hangs says where, when the watchdog ends it (SIGABRT); other threads run on, so theirs cannot be read
    faulthandler.enable(file=2, all_threads=False)

    async def serve() -> None:
        sys.setswitchinterval(SWITCH_S)
        _share_one_heap()
        with daemon(options, open_files=_open_more_files()) as served:
            begun()
            running = asyncio.get_running_loop()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignored it would have exit codes thrown away
            for number in (signal.SIGTERM, signal.SIGINT):
                running.add_signal_handler(number, served.stop)
            running.add_signal_handler(signal.SIGHUP, served.look_again)
            running.call_later(SETTLED_S, _settle_memory)
            await served.run()

    asyncio.run(serve())
    return 0


def _open_more_files() -> int:
    """Let this process have as many descriptors as it may: two for each endpoint, and more; the soft limit before."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def _share_one_heap() -> None:
    """Before there are threads: a heap for each (mallopt(3)) keeps 2 MiB more on a box of 200 endpoints, of no use."""
    import ctypes

    with suppress(AttributeError):  # a C library without that
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _settle_memory() -> None:
    """What is there now stays for as long as the daemon: collections look only at what comes and goes, and often.

    What the start has used up is given back to the system: of 200 endpoints 14 MiB, which would be kept for later.
    """
    import ctypes

    gc.collect()
    with suppress(AttributeError):  # a C library without that
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


def reset(options: Options, name: str) -> str:
    """Clear what keeps `name` (endpoint, finished overlay, GPU) from being tried again; what was done, in words.

    Raises:
        ReconcilerError: nothing has that name.
    """
    state = state_dir(options)
    answer = ask(state, "reset", name=name)
    if answer is not None:
        return str(answer["message"])
    from reconciler.journal.journal import Journal
    from reconciler.plan.requests import reset as forgive
    from reconciler.plan.requests import unknown

    clock = SystemClock()
    state.ensure()
    with acquire_writer(state):
        journal = Journal.open(state.journal, clock)
        try:
            gpus = {uuid: uuid for uuid in journal.ledger().quarantines}
            found = forgive(journal.ledger(), name, gpus)
            if found is None:
                raise unknown(journal.ledger(), name, gpus)
            journal.commit(*found, clock.now())
        finally:
            journal.close()
    return f"{name} is reset" if found[1] else f"{name} had nothing to reset"

"""What happens on the box while somebody is killed: each a turn that begins and ends at rest."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import mkdtemp
from threading import Lock
from typing import Any

from msgspec import Struct
from watching import Point, Trap
from world import World, Zygote

MOST_WRONG = 5
"""Then the rest is left out: whatever it is has been told."""

Seen = dict[str, Any]
Look = Callable[[], Seen | None]


class Scene(Struct, frozen=True):
    """One kind of turn."""

    name: str
    begin: Callable[[World, int], Look]
    """Begins turn N; the answer looks whether the box is at rest again, and has a new daemon where one is dead."""
    born: tuple[str, ...]
    """Whose program has to start in a turn, once each. `job` stands for the turn's own."""
    prepare: Callable[[World], None] = lambda world: None
    """What the files say before the first daemon."""
    afresh: bool = False
    """Each turn has a box of its own, on which nothing ran before."""


def boot(world: World, _: int) -> Look:
    world.start()
    return lambda: tended(world) or world.at_rest({})


def evict(world: World, turn: int) -> Look:
    world.drop_job(f"job-{turn}")
    return lambda: tended(world) or world.at_rest({f"job-{turn}": ("done", "failed")})


def edit(world: World, turn: int) -> Look:
    """The endpoint before the edit and the one after it are stubborn."""
    world.spec["endpoints"]["humble"]["env"] = {"TURN": str(turn)}
    world.write()
    before = world.births()["humble"]
    return lambda: tended(world) or (world.at_rest({}) if world.births()["humble"] > before else None)


def stubborn(world: World) -> None:
    humble = world.spec["endpoints"]["humble"]
    humble["command"] = [*humble["command"], "--stubborn"]
    humble["stop"] = {"drain": "0s", "grace": "200ms"}
    world.write()


def crash(world: World, _: int) -> Look:
    before = world.births()["humble"]
    (leader,) = world.living()["humble"]
    os.kill(leader.pid, signal.SIGKILL)
    return lambda: tended(world) or (world.at_rest({}) if world.births()["humble"] > before else None)


def adopt(world: World, turn: int) -> Look:
    """A daemon that was killed in its sleep, and the next one."""
    trap = world.watcher.trap
    world.watcher.begin(None)
    world.signal(signal.SIGKILL)
    world.watcher.begin(trap)
    return boot(world, turn)


def leave(world: World, _: int) -> Look:
    """A daemon that is asked to end, and the next one."""
    assert world.pidfd is not None
    signal.pidfd_send_signal(world.pidfd, signal.SIGTERM)

    def look() -> Seen | None:
        if world.dead() and not world.watcher.paused:
            world.watcher.paused = True
        return tended(world) or (world.at_rest({}) if world.watcher.paused else None)

    return look


def down(world: World, _: int) -> Look:
    """Everything is stopped by `reconciler down`, as often as it is killed over it; then a daemon starts it again."""
    trap = world.watcher.trap
    world.watcher.begin(None)
    world.signal(signal.SIGTERM)
    world.watcher.begin(trap)
    world.start("down")

    def look() -> Seen | None:
        if not world.watcher.paused:
            if world.dead():
                world.buried()
                if world.living():
                    world.start("down")
                else:
                    world.watcher.paused = True
                    world.start()
            return None
        return world.at_rest({})

    return look


def tended(world: World) -> None:
    """Whoever looks after the daemon: systemd, or a person."""
    if world.dead():
        world.buried()
        world.start()


def sleepy(world: World) -> None:
    world.spec["policy"]["resync"] = "500ms"
    world.let_sleep("humble")


def widow(world: World, turn: int) -> Look:
    """The one that gives way has lost its shim: who belongs to it is told by a sweep of /proc."""
    (leader,) = world.living()["humble"]
    trap = world.watcher.trap
    world.watcher.begin(None)
    os.kill(leader.parent_pid, signal.SIGKILL)
    world.until(lambda: world.shown("humble")["pid"] == leader.pid, "it is shown still")
    world.watcher.begin(trap)
    return evict(world, turn)


SCENES = {
    scene.name: scene
    for scene in (
        Scene("evict", evict, ("job", "humble")),
        Scene("boot", boot, ("important", "humble"), afresh=True),
        Scene("edit", edit, ("humble", "humble/stray"), prepare=stubborn),
        Scene("crash", crash, ("humble",)),
        Scene("adopt", adopt, ()),
        Scene("leave", leave, ()),
        Scene("down", down, ("important", "humble")),
        Scene("widow", widow, ("job", "humble")),
        Scene("nap", evict, ("job",), prepare=sleepy),
    )
}


class Stage:
    """A box on which one scene is played again and again."""

    def __init__(self, scene: Scene, *, every: bool = False) -> None:
        self.scene, self.every = scene, every
        self.zygote = Zygote()  # its own, so that whatever lives below it is of this box
        self.turn = 0
        self.world: World | None = None

    def play(self, trap: Trap | None) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
        """One turn, and everything that has to hold after it.

        Returns:
            What was about to be done in it; and of that, what came after the last kill.
        """
        world = self._world()
        self.turn += 1
        before, job = world.births(), f"job-{self.turn}"
        world.watcher.begin(trap)
        look = self.scene.begin(world, self.turn)
        seen = world.until(look, lambda: f"at rest after {self.scene.name}: {world.status()}")
        done = tuple(world.watcher.points), tuple(world.watcher.afterwards)
        world.check(seen)
        wanted = Counter(job if name == "job" else name for name in self.scene.born)
        if "job" in self.scene.born:
            outcome = next((o["state"], o["exit_code"]) for o in seen["overlays"] if o["name"] == job)
            allowed = outcomes(trap)
            assert outcome in allowed, outcome
            wanted[job] = allowed[outcome]
            ends = [words for words in world.noted("ends") if words[0] == job]
            assert len(ends) == wanted[job], f"{job} ran to its end {len(ends)} times"
            (world.overlays / f"{job}.yaml").unlink()
        born = world.births() - before
        assert born == +wanted, f"began to run: {dict(born)}, wanted: {dict(wanted)}"
        if self.scene.afresh:
            self.clear()
        return done

    def _world(self) -> World:
        if self.world is None:
            world = self.world = World(Path(mkdtemp(prefix="crash-")), self.zygote, every=self.every)
            self.scene.prepare(world)
            if not self.scene.afresh:
                world.remember("important")
                world.remember("humble")
                world.start()
                world.until(lambda: world.at_rest({}), "at rest at first")
            world.bystander("one-who-looks-alike")
            world.bystander("one-who-says-so", RECONCILER_SUBJECT="humble")
        return self.world

    def events(self) -> str:
        return self.world.events() if self.world is not None else ""

    def close(self) -> None:
        self.clear()
        self.zygote.close()

    def clear(self) -> None:
        """The next turn is on another box."""
        if self.world is not None:
            self.world.close()
            shutil.rmtree(self.world.root)
            self.world = None


WELL, UNKNOWN, KILLED = ("done", 0), ("failed", None), ("failed", -signal.SIGKILL)
"""State and exit code of a job."""


def outcomes(trap: Trap | None) -> dict[tuple[str, int | None], int]:
    """How a job may end for which nothing else is to blame, and how often its program ran then.

    A shim that is killed between the end of its leader and the durable record of it takes the exit code along. The
    leader is the job's own process, also before it becomes the job's program; that it never did is not known if it is
    killed right after its shim.
    """
    while trap is not None:
        if trap.victim == "shim" and trap.point.deed.endswith(".exit.json.tmp"):
            return {WELL: 1, UNKNOWN: 1}
        if trap.victim == "leader":
            return {WELL: 1, UNKNOWN if trap.point.deed.startswith("unlink") else KILLED: 0}
        trap = trap.then
    return {WELL: 1}


@dataclass
class Played:
    """What came of playing a scene with traps."""

    wrong: list[str] = field(default_factory=list)
    missed: list[Point] = field(default_factory=list)
    """What was not come by, nor when tried again: how many commits a turn takes hangs on time."""
    names: set[str] = field(default_factory=set)
    """Of every point that was come by and has to be listed."""
    kills: int = 0


def play_all(
    scene: Scene, traps: Iterable[Trap], known: Collection[str] | None, *, boxes: int, every: bool = False
) -> Played:
    """Play the scene once for each trap, on several boxes at once.

    What is done only where somebody was killed before (`known` does not name it) is a trap of its own, set once; with
    None it is not.
    """
    left: SimpleQueue[Trap] = SimpleQueue()
    played, lock = Played(), Lock()
    for trap in traps:
        left.put(trap)

    def play(stage: Stage, trap: Trap) -> None:
        points, afterwards = stage.play(trap)
        if not trap.last.sprung:
            points, afterwards = stage.play(trap.again())
        with lock:
            new = {p.name: p for p in reversed(afterwards) if not p.unlisted and p.name not in played.names}
            played.names.update(p.name for p in points if not p.unlisted)
            if trap.last.sprung:
                played.kills += 1
            else:
                played.missed.append(trap.last.point)
        for name, point in new.items():
            if known is not None and name not in known:
                left.put(Trap(trap.point, trap.victim, then=Trap(point, point.role)))

    def work() -> None:
        stage = Stage(scene, every=every)
        try:
            while len(played.wrong) < MOST_WRONG:
                trap = left.get_nowait()
                try:
                    play(stage, trap)
                except AssertionError as error:
                    with lock:
                        played.wrong.append(f"{trap}: {error}\n{stage.events()}")
                    stage.clear()
        except Empty:
            pass
        finally:
            stage.close()

    with ThreadPoolExecutor(boxes) as pool:
        for done in [pool.submit(work) for _ in range(boxes)]:
            done.result()  # whatever else went wrong is told as it is
    return played


def recorded(scene: Scene, *, every: bool = False) -> tuple[Point, ...]:
    """What is about to be done in a turn in which nobody is killed."""
    stage = Stage(scene, every=every)
    try:
        if not scene.afresh:
            stage.play(None)  # the first of a box is not like the later ones
        return stage.play(None)[0]
    finally:
        stage.close()

"""kill -9 at every call that changes something, and at random pairs of them: tests/crash, for as long as one likes.

python benchmarks/crash.py                       every occurrence of every call in every scene
python benchmarks/crash.py --scene evict edit    in these alone
python benchmarks/crash.py --pairs 500           500 pairs instead: the second kill in what the first left to be done
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests/crash"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import stopper  # noqa: E402 - the path comes first
from scenes import SCENES, Scene, Stage, play_all, recorded  # noqa: E402
from watching import Trap  # noqa: E402


def all_of(scene: Scene) -> list[Trap]:
    """The process that is about to make a call killed, and the daemon while another is."""
    points = recorded(scene, every=True)
    alone = [Trap(p, p.role) for p in points]
    return alone + [Trap(p, "daemon") for p in points if p.role != "daemon"]


def pairs_of(scene: Scene, count: int, chance: random.Random) -> list[Trap]:
    """Two kills in one turn; the second at something that is done after the first."""
    first = all_of(scene)
    found: list[Trap] = []
    stage = Stage(scene, every=True)
    try:
        for _ in range(3 * count):  # after some kills nothing of the turn is left to be done
            if len(found) == count:
                break
            trap = chance.choice(first)
            _, afterwards = stage.play(Trap(trap.point, trap.victim))
            if afterwards:
                point = chance.choice(afterwards)
                found.append(Trap(trap.point, trap.victim, then=Trap(point, point.role)))
    finally:
        stage.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES), help="default: all")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="so many pairs, over all scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--boxes", type=int, default=4, help="at once; a box mostly waits")
    words = parser.parse_args()
    if (problem := stopper.unavailable()) is not None:
        sys.exit(problem)
    chance, failed = random.Random(words.seed), 0
    for name in words.scene:
        began = time.perf_counter()
        each = -(-words.pairs // len(words.scene))
        traps = pairs_of(SCENES[name], each, chance) if words.pairs else all_of(SCENES[name])
        played = play_all(SCENES[name], traps, None, boxes=words.boxes, every=True)
        failed += len(played.wrong)
        missed = f", {len(played.missed)} not come by" if played.missed else ""
        print(f"{name}: {played.kills} turns with a kill in {time.perf_counter() - began:.0f} s{missed}", flush=True)
        for text in played.wrong:
            print(f"  WRONG {text}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

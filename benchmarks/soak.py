"""Boxes on which things break, by the thousand: the simulation of tests/simulation, for as long as one likes.

python benchmarks/soak.py --seeds 20000          what breaks anyhow; reports the first failing seed, shrunk
python benchmarks/soak.py --seed 4711            one seed, with its story
python benchmarks/soak.py --incidents 50         planned overlays and unplanned strikes: false and missed incidents
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "simulation"), str(TESTS / "plan"), str(TESTS)]

from running import faulty, report, run  # noqa: E402 - the path comes first
from scenario import Draw  # noqa: E402
from verdicts import false_incidents, missed  # noqa: E402

OVERLAYS = 20
STRIKES = 20


def one(seed: int) -> tuple[int, bool, Counter[str]]:
    """Seed, whether it went well, and what happened."""
    outcome = faulty(seed)
    happened = Counter(f.kind for f in outcome.scenario.faults)
    happened["looks"], happened["writes and acts"] = outcome.box.ticks, outcome.box.boundaries
    return seed, outcome.problem is None, happened


def told(seed: int) -> tuple[int, Counter[str]]:
    """What became of one box with planned overlays alone, and of one that is struck as well."""
    calm, struck = run(Draw(seed).planned(OVERLAYS)), run(Draw(seed).struck(OVERLAYS, STRIKES))
    happened = Counter({"planned overlays": len(calm.scenario.drops), "evictions": len(calm.box.evictions)})
    happened["false incidents while all is planned"] = len(calm.box.incidents)
    happened["strikes"] = len(struck.box.struck)
    happened["strikes missed"] = len(missed(struck))
    happened["false incidents beside strikes"] = len(false_incidents(struck))
    happened["boxes that did not come to rest"] = (calm.problem is not None) + (struck.problem is not None)
    return seed, happened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone, with its story")
    parser.add_argument("--incidents", type=int, metavar="BOXES", help="count false and missed incidents instead")
    words = parser.parse_args()
    if words.seed is not None:
        outcome = faulty(words.seed)
        print(report(outcome) if outcome.problem else f"{outcome.scenario}\n" + "\n".join(outcome.trace))
        return int(outcome.problem is not None)
    began, total, failed = time.perf_counter(), Counter[str](), []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        if words.incidents is not None:
            for _, happened in pool.map(told, range(words.first, words.first + words.incidents)):
                total.update(happened)
            print("\n".join(f"{count:8} {what}" for what, count in total.items()))
            wrong = ("false incidents while all is planned", "strikes missed", "false incidents beside strikes")
            return int(any(total[what] for what in (*wrong, "boxes that did not come to rest")))
        for seed, well, happened in pool.map(one, range(words.first, words.first + words.seeds), chunksize=20):
            total.update(happened)
            if not well:
                failed.append(seed)
                print(f"seed {seed} fails", flush=True)
    spent = time.perf_counter() - began
    print(f"{words.seeds} seeds in {spent:.0f} s, {len(failed)} failed")
    print(", ".join(f"{count} {what}" for what, count in total.most_common()))
    if failed:
        print(report(faulty(failed[0])))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

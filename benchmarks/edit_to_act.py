"""From the rename of edited set points to the first act on the box.

Measured: an edited setpoints.yaml is renamed into place. (a) The edit changes an endpoint's environment: until its old
process is in the handler of its stop signal. (b) The edit adds an endpoint: until the first instruction of its process.
Floor of (b): the same stub spawned by a bare Popen in the same run, turn about; (a) has none but the clock's.
Aim: at most 150 ms.
"""

from __future__ import annotations

import argparse

from stage import box, describe, show, spawn_directly, wait_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    signals, starts, floors = [], [], []
    with box() as one:
        one.endpoint("edited", gpus=1, gib=60)
        one.endpoint("bystander", gpus=1, gib=60)
        one.write()
        one.start()
        one.wait_healthy()
        for turn in range(runs):
            floors.append(spawn_directly(one, "floor"))

            one.spec["endpoints"]["edited"]["env"] = {"TURN": str(turn)}
            renamed = one.write()
            signals.append(one.wait_noted("edited", "sigterm", renamed))
            one.wait_healthy()

            one.endpoint("added", gpus=0)
            renamed = one.write()
            starts.append(one.wait_noted("added", "first", renamed))
            one.wait_healthy()

            del one.spec["endpoints"]["added"]
            one.write()
            wait_for(lambda: "added" not in one.endpoints(), "the added endpoint is gone", poll_s=0.1)
    rows = [
        ["edited: rename → its old process is signalled", *describe(signals), "150"],
        ["added: rename → first instruction of its process", *describe(starts), "150"],
        ["floor: bare spawn → first instruction", *describe(floors), ""],
    ]
    show(f"edit → first act, ms, {runs} runs each", ["case", "p50", "p90", "aim"], rows)


if __name__ == "__main__":
    main()

"""Ask the real vLLM all questions, and keep its answers in `real_vllm.json`: what the simulated one is held to.

RECONCILER_TEST_VLLM=$(examples/cpu-vllm/setup.sh) python tests/sim/record_real_vllm.py [SCENE…]

Some eight minutes on two idle cores. With the names of scenes, only their answers are made anew.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from questions import SCENES, real_kind
from simulated_box import Engine

FILE = Path(__file__).with_name("real_vllm.json")


def main(names: list[str]) -> None:
    vllm = Path(os.environ["RECONCILER_TEST_VLLM"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, and inherited so
    answers = {}
    version = subprocess.run([str(vllm), "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    for name in names or SCENES:
        began, started = time.monotonic(), list[Engine]()
        with tempfile.TemporaryDirectory() as folder:
            try:
                answers[name] = SCENES[name](real_kind(vllm, Path(folder), started))
            finally:
                for engine in started:
                    with suppress(ProcessLookupError):
                        os.killpg(engine.pid, signal.SIGKILL)
        print(f"{name}: {time.monotonic() - began:.0f} s {json.dumps(answers[name], indent=1)}", flush=True)
    before = json.loads(FILE.read_text("utf-8"))["answers"] if names and FILE.exists() else {}
    kept = {"vllm": version, "asked": dt.datetime.now(dt.UTC).date().isoformat(), "answers": before | answers}
    FILE.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

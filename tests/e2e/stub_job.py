"""A job in miniature: holds memory on its GPUs, says that it runs, waits for a file to appear, ends with a code.

usage: stub_job.py FOLDER [--gib N] [--exit-code N] [--api-key K]
It writes FOLDER/began (its pid, a line a start) and goes on until FOLDER/finish exists.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from stub_server import hold


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--exit-code", type=int, default=0)
    parser.add_argument("--api-key")
    options = parser.parse_args()
    hold(options.gib)
    with (options.folder / "began").open("a") as file:
        file.write(f"{os.getpid()}\n")
    print("rendering", flush=True)
    while not (options.folder / "finish").exists():
        time.sleep(0.02)
    return options.exit_code


if __name__ == "__main__":
    sys.exit(main())

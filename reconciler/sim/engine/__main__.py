"""Run as a file, with nothing installed: finds its own package next to itself."""

import importlib
import os
import sys

if __name__ == "__main__":
    # appended, not put first: the folder above holds modules of other names only, and the library must come before it
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - pathlib costs 5 ms
    importlib.import_module("engine.api").main(sys.argv[1:])

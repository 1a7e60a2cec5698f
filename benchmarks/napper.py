"""A model server that takes as long as it is told to load, to fall asleep, to wake up and to end; real seconds.

usage: napper.py PORT GIB LOAD STOP SLEEP_1 WAKE_1 SLEEP_2 WAKE_2

It holds GIB on each of its GPUs of the simulated node, 1 GiB of it while it sleeps. It has vLLM's POST
/sleep?level=1|2, POST /wake_up and GET /is_sleeping.
"""

import http.server
import json
import os
import signal
import sys
import time
from urllib.parse import parse_qs, urlsplit

RESIDUE_GIB = 1.0


def hold(gib: float) -> None:
    """The entry in the ledger of each GPU that was handed over, replaced whole."""
    with open("/proc/self/stat") as stat:  # noqa: PTH123
        name = f"{os.getpid()}-{stat.read().rpartition(')')[2].split()[19]}"
    for index in filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        folder = f"{os.environ['RECONCILER_SIM_DIR']}/gpus/{index}"
        with open(f"{folder}/.{name}", "w") as file:  # noqa: PTH123
            file.write(str(int(gib * (1 << 30))))
        os.replace(f"{folder}/.{name}", f"{folder}/{name}")  # noqa: PTH105


def main() -> None:
    port, (gib, load_s, stop_s, *naps) = int(sys.argv[1]), map(float, sys.argv[2:])
    sleep_s, wake_s = {1: naps[0], 2: naps[2]}, {1: naps[1], 2: naps[3]}
    level = 0  # awake

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"is_sleeping": level > 0})

        def do_POST(self) -> None:
            nonlocal level
            url = urlsplit(self.path)
            if url.path == "/sleep" and not level:
                wanted = int(parse_qs(url.query)["level"][0])
                time.sleep(sleep_s[wanted])
                hold(RESIDUE_GIB)
                level = wanted
            elif url.path == "/wake_up" and level:
                time.sleep(wake_s[level])
                hold(gib)
                level = 0
            self.answer({})

        def answer(self, said: dict[str, bool]) -> None:
            page = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            return

    def end(*_: object) -> None:
        time.sleep(stop_s)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    hold(gib)
    time.sleep(load_s)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

"""The HTTP client, as the program loads it."""

from __future__ import annotations

import json
import subprocess
import sys


def test_what_only_the_command_line_of_httpx_needs_is_not_loaded_with_it() -> None:
    code = (
        "import json, sys; from reconciler.http import httpx; httpx.Client(verify=False).close();"
        "print(json.dumps(sorted({'click', 'pygments', 'rich'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []

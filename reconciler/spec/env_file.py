"""`env_file`: KEY=VALUE lines. Values are secrets: no message of this module ever holds one."""

from __future__ import annotations

from reconciler.spec.trust import MAX_BYTES
from reconciler.spec.values import variable_problem


def parse_env_file(content: bytes) -> dict[str, str]:
    """Variables in `KEY=VALUE` lines; `#` begins a comment line, `export` and quotes around a value are allowed.

    Raises:
        ValueError: a line is wrong; the message has its number and never its value.
    """
    if len(content) > MAX_BYTES:
        raise ValueError("is larger than 1 MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    found: dict[str, str] = {}
    for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.removeprefix("export ").partition("=")
        key, value = key.strip(), value.strip()
        if not equals:
            raise ValueError(f"line {number} is not KEY=VALUE")
        if "\0" in line:
            raise ValueError(f"line {number} holds a NUL")
        if problem := variable_problem(key):
            # a key that is no name may be half of a secret: only owned names are repeated
            raise ValueError(f"line {number}: " + (problem if "belongs" in problem else "not the name of a variable"))
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[key] = value
    return found

"""The environment of a leader: what it may inherit, what files and set points add, what is ours alone.

A daemon's own environment is an accident of who started it; a leader gets an allow-list of it, so that it starts the
same from a shell, from systemd and after an upgrade, and so that tokens of the person at the keyboard do not travel.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from reconciler.errors import ActError

INHERITED = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR",
    "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "TORCH_HOME",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
})  # fmt: skip
"""Names a leader inherits from the daemon: where things are found, the locale, the way to the network."""

INHERITED_FAMILIES = ("LC_", "XDG_", "NCCL_", "UCX_", "VLLM_", "SGLANG_", "LLAMA_ARG_", "OMP_")
"""Prefixes of further names it inherits: tuning of the box and of the engines."""

OWNED = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
OWNED_FAMILY = "RECONCILER_"
"""Names that only the reconciler sets; from anywhere else they are dropped."""

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""What a name of a family must not contain to be inherited (VLLM_API_KEY). Such things belong in an env_file."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_LARGEST_FILE = 1 << 20


def child_environment(
    parent: Mapping[str, str],
    *,
    env_file: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    owned: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The complete environment of a leader; later sources win: inherited, `env_file`, `env`, `owned`.

    The markers of an incarnation are not in it: `ProcessActor.ensure_started` adds those.
    """
    child = {name: value for name, value in parent.items() if _inherits(name)}
    for source in (env_file or {}, env or {}):
        child.update((name, value) for name, value in source.items() if not _is_owned(name))
    child.update(owned or {})
    return child


def _inherits(name: str) -> bool:
    return name in INHERITED or (name.startswith(INHERITED_FAMILIES) and not _SECRET.search(name))


def _is_owned(name: str) -> bool:
    return name in OWNED or name.startswith(OWNED_FAMILY)


def read_env_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Variables of a file of `NAME=VALUE` lines, as Docker Compose reads them, but without interpolation.

    Blank lines and lines that begin with `#` are skipped, `export ` in front is allowed; a value in single quotes is
    literal, in double quotes backslash escapes count; ` #` ends an unquoted value.

    Raises:
        ActError: unreadable, malformed, or others may have written it. No message ever holds a value.
    """
    file = Path(path)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as opened:
            info = os.fstat(fd)
            text = opened.read(_LARGEST_FILE).decode() if stat.S_ISREG(info.st_mode) else None
    except OSError as error:
        raise ActError(f"{file}: env_file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ActError(f"{file}: env_file is not UTF-8 text") from None  # its context would show the bytes
    if text is None:
        raise ActError(f"{file}: env_file is not a regular file")
    if info.st_uid not in (os.geteuid(), 0) or info.st_mode & stat.S_IWOTH:
        raise ActError(
            f"{file}: env_file must belong to this user or root and not be writable by others", hint=f"chmod o-w {file}"
        )
    variables: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, separator, value = stripped.removeprefix("export ").partition("=")
        name = name.strip()
        if not separator or not _NAME.fullmatch(name) or "\0" in value:
            raise ActError(f"{file}:{number}: not of the form NAME=VALUE")
        parsed = _parse_value(value.strip())
        if parsed is None:
            raise ActError(f"{file}:{number}: the value of {name} has no closing quote")
        variables[name] = parsed
    return variables


def _parse_value(text: str) -> str | None:
    """The value that `text` stands for; None when its quote is not closed."""
    quote = text[:1]
    if quote == "'":
        end = text.find("'", 1)
        return text[1:end] if end > 0 else None
    if quote != '"':
        return re.split(r"\s#", text, maxsplit=1)[0].rstrip()
    value = ""
    rest = iter(text[1:])
    for character in rest:
        if character == '"':
            return value
        if character == "\\":
            escaped = next(rest, "")
            value += _ESCAPES.get(escaped, escaped)
        else:
            value += character
    return None

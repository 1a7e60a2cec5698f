"""The environment of a leader: what it may inherit, what files and set points add, what is ours alone.

A daemon's own environment is an accident of who started it; a leader gets an allow-list of it, so that it starts the
same from a shell, from systemd and after an upgrade, and so that tokens of the person at the keyboard do not travel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from reconciler.act.account import Account
from reconciler.errors import ActError
from reconciler.spec.env_file import parse_env_file
from reconciler.spec.trust import UntrustedError, read_trusted

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

_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""What a name of a family must not contain to be inherited (VLLM_API_KEY). Such things belong in an env_file."""


def child_environment(
    parent: Mapping[str, str],
    *,
    account: Account | None = None,
    env_file: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of a leader; later sources win: what it inherits of `parent`, its `account`, `env_file`, `env`.

    Another user's home, and the folders that the daemon's user keeps things in (XDG_, TMPDIR), are of no use to it.

    The markers of an incarnation are not in it: `ProcessActor.ensure_started` adds those, over anything.
    """
    inherited = {name: value for name, value in parent.items() if _inherits(name)}
    if account is not None:
        inherited = {name: value for name, value in inherited.items() if not name.startswith("XDG_")}
        inherited.pop("TMPDIR", None)
        inherited |= {"HOME": account.home, "USER": account.name, "LOGNAME": account.name, "SHELL": account.shell}
    return {**inherited, **(env_file or {}), **(env or {})}


def _inherits(name: str) -> bool:
    return name in INHERITED or (name.startswith(INHERITED_FAMILIES) and not _SECRET.search(name))


def read_env_file(path: str) -> dict[str, str]:
    """Variables of an `env_file`, read when something is started: its values are kept nowhere.

    Raises:
        ActError: unreadable, malformed, or others may have written it. No message ever holds a value.
    """
    try:
        return parse_env_file(read_trusted(path))
    except OSError as error:
        hint = error.hint if isinstance(error, UntrustedError) else None
        raise ActError(f"{path}: env_file cannot be read: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise ActError(f"{path}: env_file {error}") from None

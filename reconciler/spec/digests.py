"""Hashes of meaning: equal for equal values, whatever the order, comments or spelling of the text they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from msgspec import Struct
from pydantic import BaseModel

from reconciler.spec.profiles import EngineProfile
from reconciler.spec.spec import EndpointSpec, Spec

_PLAIN = (str, int, float)
_NO_MEANING = frozenset({"source", "problems", "digest", "change_pending", "withdrawn"})


def digest(value: object) -> str:
    """Sixteen hex digits of SHA-256 over the canonical form of `value`."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(value: object) -> object:
    """Plain data; structs carry their name (claims differ by it), models only what was written."""
    if value is None or isinstance(value, _PLAIN):  # most of all, and to be a `Mapping` or not is dear to find out
        return value
    match value:
        case BaseModel():
            return {name: canonical(getattr(value, name)) for name in value.model_fields_set}
        case Mapping():
            return {str(key): canonical(item) for key, item in value.items()}
        case list() | tuple():
            return [canonical(item) for item in value]
    if isinstance(value, Struct):
        parts = {n: canonical(getattr(value, n)) for n in value.__struct_fields__ if n not in _NO_MEANING}
        return {"": type(value).__name__, **parts}
    raise TypeError(type(value).__name__)


def process_hash(endpoint: EndpointSpec, secrets: str | None) -> str:
    """Hash of what needs a new process when it changes; `secrets` is the digest of the `env_file`'s content."""
    return digest(
        {
            "model": endpoint.model,
            "engine": endpoint.engine,
            "executable": endpoint.executable,
            "gpus": endpoint.gpus.count,
            "memory": endpoint.memory,
            "port": endpoint.port,
            "args": endpoint.args,
            "command": endpoint.command,
            "env": endpoint.env,
            "env_file": endpoint.env_file,
            "secrets": secrets,
            "cwd": endpoint.cwd,
            **({"user": endpoint.user} if endpoint.user else {}),
            **({"profile": _command_of(endpoint.own_profile)} if endpoint.own_profile else {}),
        }
    )


def _command_of(profile: EngineProfile) -> tuple[object, ...]:
    """What of a profile is in the command line and the environment of who is started by it."""
    return (
        profile.executable, profile.base_args, profile.model_args, profile.file_args, profile.many_gpus_args,
        profile.fraction_args, profile.env,
    )  # fmt: skip


def spec_digest(spec: Spec) -> str:
    """Hash of the whole meaning."""
    return digest(spec)

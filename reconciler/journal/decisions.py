"""Decisions as the journal keeps them: all that went into one, so that it can be made again.

What no decision reads is left out before anything is written: the values that endpoints and workloads find in their
environments, what looks like a secret in their command lines, and the addresses that incidents are told to.
"""

from __future__ import annotations

import hashlib
import zlib
from functools import cache
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reconciler.clock import Instant
from reconciler.journal.codec import decode, encode
from reconciler.plan import solver
from reconciler.plan.actions import WAITS, Plan
from reconciler.plan.ledger import Ledger
from reconciler.plan.observed import Observed
from reconciler.spec.profiles import EngineProfile
from reconciler.spec.secrecy import redacted
from reconciler.spec.spec import EndpointSpec, OverlaySpec, Spec

DECISIONS_KEPT = 2_000
"""With eight GPUs and twenty endpoints about 4 KiB each: 8 MiB, and on a busy box the last days."""
PRUNE_DECISIONS_EVERY = 100
_DECIDING = ("plan/*.py", "spec/*.py", "clock.py", "units.py", "journal/codec.py")


class Inputs(Struct, frozen=True):
    """The four values that `plan()` was given."""

    spec: Spec
    observed: Observed
    ledger: Ledger
    now: Instant


class Made(Struct, frozen=True):
    """A decision that was just made: what went in, and what came out."""

    inputs: Inputs
    plan: Plan


class Decision(Struct, frozen=True):
    """A decision of the past."""

    id: int
    """Grows with each decision; never used twice."""
    wall: float
    """Epoch seconds."""
    version: str
    """Of the program that made it, and of the solver if it was asked (`maker`)."""
    inputs: Inputs
    outcome: str
    """`digest` of the plan that came out."""


def digest(plan: Plan) -> str:
    """What tells one plan from another: the SHA-256 of its canonical bytes.

    Raises:
        TypeError, ValueError: it holds what has no text (a number that is not finite).
    """
    return hashlib.sha256(encode(plan).encode()).hexdigest()


def maker(plan: Plan) -> str:
    """What made a plan, and makes it again from the same inputs: version and sources, and the solver's if it was asked.

    Such as `0.1.0+5f3c09ab with ortools 9.12`: between two releases one version has many sources.
    """
    return f"{_own_version()} with {solver.version()}" if plan.solved else _own_version()


@cache  # read from the package's files, which are large, and asked at every decision
def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, and only the daemon needs it

    made_of = sources(Path(__file__).parents[1])  # first: without descriptors it says so, `version` finds no package
    try:
        return f"{version('reconciler')}+{made_of}"
    except PackageNotFoundError:  # run from its sources
        return f"unknown+{made_of}"


def sources(package: Path) -> str:
    """What tells one planner from another: eight hex digits of the SHA-256 of all that a plan, and its text, depend on.

    Args:
        package: the folder of this program
    """
    found = hashlib.sha256()
    for path in sorted(path for pattern in _DECIDING for path in package.glob(pattern)):
        found.update(hashlib.sha256(path.relative_to(package).as_posix().encode()).digest())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:8]


def deeds(plan: Plan) -> tuple[tuple[str, str, str | None], ...]:
    """What a plan has done now: op, subject and incarnation."""
    return tuple((a.op, str(a.subject), a.incarnation) for a in plan.actions if a.ready and a.op not in WAITS)


def pack(text: str) -> bytes:
    """Compressed; about a seventh."""
    return zlib.compress(text.encode(), 3)


def packed_spec(spec: Spec) -> tuple[str, bytes]:
    """The spec without what no decision reads: its key, and its bytes."""
    bare = replace(
        spec,
        endpoints={name: _bare(e) for name, e in spec.endpoints.items()},
        overlays={name: _bare_overlay(o) for name, o in spec.overlays.items()},
        notify={},
    )
    text = encode(bare)
    return hashlib.sha256(text.encode()).hexdigest(), pack(text)


def packed_rest(inputs: Inputs) -> tuple[bytes, bytes, bytes]:
    """What was observed, the ledger, and the moment."""
    return pack(encode(inputs.observed)), pack(encode(inputs.ledger)), encode(inputs.now).encode()


def unpacked(spec: bytes, observed: bytes, ledger: bytes, now: bytes) -> Inputs:
    """The inputs again.

    Raises:
        DecodeError: they were written by a program whose values looked otherwise.
        zlib.error: they are damaged.
    """
    return Inputs(
        decode(Spec, zlib.decompress(spec)),
        decode(Observed, zlib.decompress(observed)),
        decode(Ledger, zlib.decompress(ledger)),
        decode(Instant, now),
    )


def _bare(endpoint: EndpointSpec) -> EndpointSpec:
    own, command = endpoint.own_profile, endpoint.command
    return replace(
        endpoint,
        env={},
        args=redacted(endpoint.args),
        command=None if command is None else redacted(command),
        own_profile=None if own is None else _bare_profile(own),
    )


def _bare_profile(profile: EngineProfile) -> EngineProfile:
    return replace(
        profile,
        env={},
        base_args=redacted(profile.base_args),
        model_args=redacted(profile.model_args),
        many_gpus_args=redacted(profile.many_gpus_args),
        fraction_args=redacted(profile.fraction_args),
        drain_args=redacted(profile.drain_args),
    )


def _bare_overlay(overlay: OverlaySpec) -> OverlaySpec:
    work = overlay.workload
    return replace(
        overlay,
        endpoints={name: _bare(e) for name, e in overlay.endpoints.items()},
        workload=None if work is None else replace(work, env={}, command=redacted(work.command)),
    )

"""From an endpoint and its engine profile to a command line and an environment.

Every server is bound to loopback unless its `args` say otherwise (a later `--host` wins): the engines' own endpoints
for sleep and metrics have no authentication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from reconciler.spec.profiles import PROFILES
from reconciler.spec.spec import EndpointSpec, MemoryBytes, MemoryFraction, WholeGpu

HOST = "127.0.0.1"
FILLED_IN_COMMANDS = ("port", "model", "gpus", "memory")
"""In the command of a custom engine these alone: it may hold other braces of its own."""


class Launch(Struct, frozen=True):
    """What is to be started."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Set on top of the inherited environment and of `env_file`; holds no secret."""


def launch(
    endpoint: EndpointSpec, *, gpu_indices: Sequence[int], gpu_total_bytes: Sequence[int], port: int | None
) -> Launch:
    """Command and environment of one start.

    Args:
        endpoint: what to start.
        gpu_indices: NVML indices it was given; empty when it needs none.
        gpu_total_bytes: total memory of each of them, in the same order.
        port: port to listen on; None only for a custom engine without one.
    """
    profile = endpoint.profile
    fraction, memory = _share(endpoint, gpu_total_bytes)
    values = {
        "host": HOST,
        "port": "" if port is None else str(port),
        "second_port": "" if port is None else str(second_port(port)),
        "model": endpoint.model or "",
        "gpus": ",".join(map(str, gpu_indices)),
        "gpu_count": str(len(gpu_indices)),
        "memory": memory,
        "fraction": fraction,
        "drain": str(math.ceil(endpoint.stop.drain_s)),
    }
    sleeping = profile.sleeps and endpoint.evict.method == "sleep"
    parts: list[str] = []
    if profile.executable is None:
        parts += _fill(endpoint.command or (), {name: values[name] for name in FILLED_IN_COMMANDS})
    else:
        is_file = endpoint.model is not None and _looks_like_path(endpoint.model)
        parts.append(endpoint.executable or profile.executable)
        parts += _fill(profile.file_args if is_file and profile.file_args else profile.model_args, values)
        parts += _fill(profile.base_args, values)
        if len(gpu_indices) > 1:
            parts += _fill(profile.many_gpus_args, values)
        if fraction:
            parts += _fill(profile.fraction_args, values)
        if endpoint.stop.drain_s > 0:
            parts += _fill(profile.drain_args, values)
        if sleeping:
            parts += _fill(profile.sleep_args, values)
    given = {**profile.env, **(profile.sleep_env if sleeping else {})}
    filled = dict(zip(given, _fill(tuple(given.values()), values), strict=True))
    return Launch((*parts, *endpoint.args), {**filled, **endpoint.env, **gpu_environment(gpu_indices)})


def gpu_environment(gpu_indices: Sequence[int]) -> dict[str, str]:
    """The variables that confine a process to these GPUs; the empty list hides all.

    NVML counts in PCI order, CUDA fastest-first unless told otherwise. SPT_NOENV keeps setproctitle from wiping the
    environment that marks a process as ours.
    """
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpu_indices)),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "SPT_NOENV": "1",
    }


def endpoint_url(port: int) -> str:
    """Where an endpoint answers."""
    return f"http://{HOST}:{port}"


def second_port(port: int) -> int:
    """The port besides its own that an endpoint may have: no two have the same, unless one of them is privileged.

    Own ports are mostly below 16384: theirs are then below 32768, where the kernel's for connections begin (ip(7),
    `ip_local_port_range`).
    """
    other = port ^ 0x4000
    return other if other >= 1024 else port ^ 0x8000


def meeting_port(endpoint: EndpointSpec) -> int | None:
    """Where the processes of an endpoint with several GPUs meet; None: nowhere that is known beforehand."""
    profile = endpoint.own_profile or PROFILES.get(endpoint.engine)
    if profile is None or endpoint.port is None or endpoint.gpus.count < 2:
        return None
    variables = (value for name, value in profile.env.items() if name not in endpoint.env)
    named = any("{second_port}" in part for part in (*profile.base_args, *profile.many_gpus_args, *variables))
    return second_port(endpoint.port) if named else None


def capability_variable(capability: str) -> str:
    """Name of the variable that hands a workload the URL of a capability."""
    return f"RECONCILER_CAPABILITY_{re.sub('[^A-Z0-9]', '_', capability.upper())}_URL"


def _share(endpoint: EndpointSpec, totals: Sequence[int]) -> tuple[str, str]:
    """The claim as a fraction and as bytes; both empty for whole GPUs or none."""
    if not totals:
        return "", ""
    match endpoint.memory:
        case WholeGpu():
            return "", ""
        case MemoryFraction(fraction):
            return _decimal(fraction), str(int(fraction * min(totals)))
        case MemoryBytes(size):
            # one fraction serves the whole gang: of the largest GPU, so that it exceeds the claim on none
            return _decimal(min(1.0, size / max(totals))), str(size)


def _decimal(fraction: float) -> str:
    """Four places, rounded down: the engine must not take more than was planned."""
    return f"{max(math.floor(fraction * 10_000 + 1e-6), 1) / 10_000:.4f}".rstrip("0").rstrip(".")


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf")


def _fill(parts: Sequence[str], values: Mapping[str, str]) -> list[str]:
    return [_filled(part, values) for part in parts]


def _filled(text: str, values: Mapping[str, str]) -> str:
    """With the value of each `{name}`; other braces stay. No pattern: the first start would wait for its compiling."""
    head, *rest = text.split("{")
    for piece in rest:
        name, brace, tail = piece.partition("}")
        head += values[name] + tail if brace and name in values else "{" + piece
    return head

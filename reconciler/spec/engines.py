"""Engine profiles: how each kind of model server is started, asked and ended. Data, with one function that fills it in.

Every server is bound to loopback unless its `args` say otherwise (a later `--host` wins): the engines' own endpoints
for sleep and metrics have no authentication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reconciler.spec.spec import EndpointSpec, MemoryBytes, MemoryFraction, WholeGpu

HOST = "127.0.0.1"

RESIDUAL = 3 << 29
"""1.5 GiB: vLLM keeps 1.1-1.2 GiB on each GPU while it sleeps, for its context and graphs (realities)."""


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One POST to an engine's own port; an answer other than 2xx is a failure."""

    path: str
    body: str | None = None
    """JSON; None: no body."""


@dataclass(frozen=True, slots=True)
class SleepLevel:
    """One way to give GPU memory back and keep the process."""

    sleep: tuple[EngineCall, ...]
    wake: tuple[EngineCall, ...]
    sleep_s: float
    """Predicted."""
    wake_part: float
    """Predicted time from the calls to ready, as a part of a whole load."""
    keeps_weights: bool
    """They move to host memory."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What is known of one engine.

    Command-line parts may hold {port} {model} {gpus} {gpu_count} {memory} {fraction} {host}; filled in at start.
    """

    name: str
    executable: str | None
    """None: the endpoint's `command` is the whole command."""
    base_args: tuple[str, ...] = ()
    model_args: tuple[str, ...] = ()
    file_args: tuple[str, ...] = ()
    """Instead of `model_args` when the model is a path; empty: the same."""
    many_gpus_args: tuple[str, ...] = ()
    """Added when it gets more than one GPU."""
    fraction_args: tuple[str, ...] = ()
    """Added when it claims less than the whole GPU; empty: the engine has no such bound."""
    sleep_args: tuple[str, ...] = ()
    """Added when it is to be evicted by sleep."""
    sleep_env: Mapping[str, str] = field(default_factory=dict)
    sleep_levels: Mapping[int, SleepLevel] = field(default_factory=dict)
    """How it frees its GPU memory and keeps its process; empty: it cannot."""
    residual_bytes: int = 0
    """Planned on each GPU for one that sleeps; it counts as asleep once NVML shows no more."""
    sleeping_path: str | None = None
    """Answers `{"is_sleeping": true|false}`, once it may sleep; None: it cannot be asked."""
    health_path: str = "/health"
    """Answers 200 when ready."""
    metrics_path: str | None = None
    busy_metrics: tuple[str, ...] = ()
    """Their sum is the number of requests running and waiting; empty: the engine does not say."""
    running_metrics: tuple[str, ...] = ()
    """Their sum is the number of requests that are being worked on; empty: the engine does not say."""
    progress_metrics: tuple[str, ...] = ()
    """Their sum grows while any request is worked on: frozen with some running, it tells a hidden hang."""
    load_s: float = 30.0
    """Predicted start to ready, until history knows better."""
    drain_s: float = 5.0
    stop_s: float = 5.0
    titles: tuple[str, ...] = ()
    """Regular expressions of process titles: secondary evidence, for people and for `doctor`."""

    @property
    def sleeps(self) -> bool:
        """Whether it can free its GPU memory and keep its process."""
        return bool(self.sleep_levels)


# Load and stop times: vLLM measured 27-98 s to ready, 0.4-0.9 s from SIGTERM to exit when idle; others by analogy.
PROFILES: Mapping[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        EngineProfile(
            name="vllm",
            executable="vllm",
            model_args=("serve", "{model}"),
            base_args=("--host", "{host}", "--port", "{port}"),
            many_gpus_args=("--tensor-parallel-size", "{gpu_count}"),
            fraction_args=("--gpu-memory-utilization", "{fraction}"),
            sleep_args=("--enable-sleep-mode",),
            sleep_env={"VLLM_SERVER_DEV_MODE": "1"},
            sleep_levels={
                # 0.3-6 s to wake with the weights in host memory, against 38-98 s; without them they are read once more
                1: SleepLevel((EngineCall("/sleep?level=1"),), (EngineCall("/wake_up"),), 5.0, 0.1, keeps_weights=True),
                2: SleepLevel(
                    (EngineCall("/sleep?level=2"),),
                    (
                        EngineCall("/wake_up?tags=weights"),
                        EngineCall("/collective_rpc", '{"method": "reload_weights"}'),
                        EngineCall("/wake_up?tags=kv_cache"),
                    ),
                    2.0,
                    0.4,
                    keeps_weights=False,
                ),
            },
            residual_bytes=RESIDUAL,
            sleeping_path="/is_sleeping",
            metrics_path="/metrics",
            busy_metrics=("vllm:num_requests_running", "vllm:num_requests_waiting"),
            running_metrics=("vllm:num_requests_running",),
            progress_metrics=("vllm:iteration_tokens_total_sum",),
            load_s=60.0,
            drain_s=10.0,
            stop_s=10.0,
            titles=(r"VLLM::\w+", r"\bvllm serve\b"),
        ),
        EngineProfile(
            name="sglang",
            executable="sglang",
            model_args=("serve", "--model-path", "{model}"),
            base_args=("--host", "{host}", "--port", "{port}", "--enable-metrics"),  # off by default; drain needs them
            many_gpus_args=("--tp-size", "{gpu_count}"),
            fraction_args=("--mem-fraction-static", "{fraction}"),
            # without the backup the weights would be gone when it resumes
            sleep_args=("--enable-memory-saver", "--enable-weights-cpu-backup"),
            sleep_levels={
                1: SleepLevel(
                    (EngineCall("/release_memory_occupation", "{}"),),
                    (EngineCall("/resume_memory_occupation", "{}"),),
                    5.0,
                    0.1,
                    keeps_weights=True,
                ),
            },
            residual_bytes=RESIDUAL,
            metrics_path="/metrics",
            busy_metrics=("sglang:num_running_reqs", "sglang:num_queue_reqs"),
            load_s=60.0,
            drain_s=10.0,
            stop_s=10.0,
            titles=(r"sglang::\w+", r"\bsglang\b"),
        ),
        EngineProfile(
            name="llamacpp",
            executable="llama-server",
            model_args=("-hf", "{model}"),
            file_args=("--model", "{model}"),
            base_args=("--host", "{host}", "--port", "{port}", "--metrics"),  # off by default; drain needs them
            metrics_path="/metrics",
            busy_metrics=("llamacpp:requests_processing", "llamacpp:requests_deferred"),
            load_s=15.0,
            stop_s=1.0,
            titles=(r"\bllama-server\b",),
        ),
        EngineProfile(
            name="tgi",
            executable="text-generation-launcher",
            model_args=("--model-id", "{model}"),
            # two launchers share /tmp/text-generation-server unless told otherwise
            base_args=("--hostname", "{host}", "--port", "{port}", "--shard-uds-path", "/tmp/text-generation-{port}"),  # noqa: S108
            many_gpus_args=("--num-shard", "{gpu_count}"),
            fraction_args=("--cuda-memory-fraction", "{fraction}"),
            metrics_path="/metrics",
            busy_metrics=("tgi_batch_current_size", "tgi_queue_size"),
            load_s=60.0,
            stop_s=10.0,
            titles=(r"\btext-generation-(?:launcher|router|server)\b",),
        ),
        EngineProfile(
            name="tei",
            executable="text-embeddings-router",
            model_args=("--model-id", "{model}"),
            base_args=("--hostname", "{host}", "--port", "{port}"),
            metrics_path="/metrics",
            busy_metrics=("te_queue_size",),
            load_s=20.0,
            stop_s=2.0,
            titles=(r"\btext-embeddings-router\b",),
        ),
        EngineProfile(name="custom", executable=None),
    )
}


@dataclass(frozen=True, slots=True)
class Launch:
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
    profile = PROFILES[endpoint.engine]
    fraction, memory = _share(endpoint, gpu_total_bytes)
    values = {
        "host": HOST,
        "port": "" if port is None else str(port),
        "model": endpoint.model or "",
        "gpus": ",".join(map(str, gpu_indices)),
        "gpu_count": str(len(gpu_indices)),
        "memory": memory,
        "fraction": fraction,
    }
    sleeping = profile.sleeps and endpoint.evict.method == "sleep"
    parts: list[str] = []
    if profile.executable is None:
        # only the four documented names: a custom command may hold other braces of its own
        custom = {name: values[name] for name in ("port", "model", "gpus", "memory")}
        parts += _fill(endpoint.command or (), custom)
    else:
        is_file = endpoint.model is not None and _looks_like_path(endpoint.model)
        parts.append(endpoint.executable or profile.executable)
        parts += _fill(profile.file_args if is_file and profile.file_args else profile.model_args, values)
        parts += _fill(profile.base_args, values)
        if len(gpu_indices) > 1:
            parts += _fill(profile.many_gpus_args, values)
        if fraction:
            parts += _fill(profile.fraction_args, values)
        if sleeping:
            parts += profile.sleep_args
    env = {**(profile.sleep_env if sleeping else {}), **endpoint.env, **gpu_environment(gpu_indices)}
    return Launch((*parts, *endpoint.args), env)


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
    pattern = re.compile(r"\{(" + "|".join(values) + r")\}")
    return [pattern.sub(lambda found: values[found[1]], part) for part in parts]

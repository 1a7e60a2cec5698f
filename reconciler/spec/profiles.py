"""Engine profiles as data: what is known of each kind of model server. `spec.engines` fills them in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from msgspec import Struct, field

from reconciler.spec.secrecy import Discreet

RESIDUAL = 3 << 29
"""1.5 GiB: vLLM keeps 1.1-1.2 GiB on each GPU while it sleeps, for its context and graphs (realities)."""


class FailurePattern(Struct, frozen=True):
    """A way in which an engine fails, told from the end of its log."""

    pattern: str
    """Regular expression, searched in the last `LOG_TAIL_BYTES`."""
    kind: str
    """A class in CamelCase, for people and alerts."""
    hint: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.hint}"


LOG_TAIL_BYTES = 64 << 10
SLEEP_PART = {1: 0.08, 2: 0.03}
"""Parts of a load, by level. Guesses: nobody published how long engines take to fall asleep."""
WAKE_PART = {1: 0.1, 2: 0.4}
"""Level 1: 0.3-6 s against 38-98 s of a cold start were published. Level 2 is a guess: weights are read again."""

_CLAP = r"(?m:^)error: (?:unexpected argument|invalid value|a value is required|the following required arguments)"
"""How programs in Rust (the launchers of TGI and TEI) refuse their command line."""

_PYTHON_FAILURES = (
    FailurePattern(
        r"Error in memory profiling",
        "MemoryChanged",
        "a neighbour on its GPU freed memory while it measured",
    ),
    FailurePattern(
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "OutOfMemory",
        "its weights leave too little for requests: a larger `memory:`, more GPUs, or a smaller `--max-model-len`",
    ),
    FailurePattern(
        r"Free memory on device .* is less than desired|OutOfMemoryError|CUDA out of memory|CUDA error: out of memory",
        "OutOfMemory",
        "give it a larger GPU or a smaller `memory:`, or see with `reconciler status` who holds its GPU",
    ),
    FailurePattern(r"[Aa]ddress already in use", "PortTaken", "another process has its port; `ss -ltnp` names it"),
    FailurePattern(
        r"(?m)error: (?:unrecognized arguments|argument |the following arguments|ambiguous option)|" + _CLAP,
        "BadArgument",
        "correct `args:`; the engine's --help knows them",
    ),
    FailurePattern(
        r"GatedRepoError|401 Client Error|403 Client Error|Access to model .* is restricted",
        "NoAccess",
        "accept the model's licence and put HF_TOKEN in its env_file",
    ),
    FailurePattern(
        r"RepositoryNotFoundError|is not a local folder and is not a valid model identifier|"
        r"Can't load the configuration of|Repo id must be in the form|Invalid repository ID",
        "ModelNotFound",
        "correct `model:`, or download it first",
    ),
)


_RUST_FAILURES = (
    FailurePattern(
        r"CUDA_ERROR_OUT_OF_MEMORY",
        "OutOfMemory",
        "give it a larger GPU or smaller batches, or see with `reconciler status` who holds its GPU",
    ),
    FailurePattern(r"Address already in use", "PortTaken", "another process has a port of it; `ss -ltnp` names it"),
    FailurePattern(_CLAP, "BadArgument", "correct `args:`; the engine's --help knows them"),
    FailurePattern(
        r"status client error \(40[13]",
        "NoAccess",
        "accept the model's licence and put HF_TOKEN in its env_file",
    ),
    FailurePattern(
        # not any 404: a model without one of the optional files is served
        r"Could not download model artifacts|`config.json` not found",
        "ModelNotFound",
        "correct `model:`, or download it first",
    ),
)

NAME_IN_BRACES = re.compile(r"(?<![{$])\{([A-Za-z_]\w*)\}(?!\})")
"""A placeholder, or what looks like one: JSON, `${SHELL}` and `{{ templates }}` do not."""
PLACEHOLDERS = ("host", "port", "second_port", "model", "gpus", "gpu_count", "memory", "fraction", "drain")
"""Names that are filled in, written as `{name}`, in the arguments and the variables of a profile."""

Word = bool | int | str
"""What a field of an engine's answer may hold that is compared with."""


class EngineCall(Struct, frozen=True):
    """One call on an engine's own port."""

    path: str
    """With its query."""
    body: str | None = None
    """JSON; None: no body."""
    method: str = "POST"
    status: int | None = None
    """The status it has to be answered with; None: any 2xx."""
    answer: Mapping[str, Word] = field(default_factory=dict)
    """Fields that the JSON object of its answer has to hold (`a.b`: b inside a)."""

    def lacks(self, status: int, page: bytes) -> str | None:
        """What is wrong with an answer to it, in words; None: nothing."""
        if status != self.status if self.status is not None else not 200 <= status < 300:
            return f"answered {status}"
        wrong = {name: found for name in self.answer if not same(found := field_of(page, name), self.answer[name])}
        return None if not wrong else f"answered {', '.join(f'{name}: {found!r}' for name, found in wrong.items())}"


class SleepCheck(Struct, frozen=True):
    """How an engine is asked whether it sleeps: a GET whose answer is a JSON object with a field that tells."""

    path: str
    field: str
    """Its name; `a.b`: b inside a."""
    asleep: Word = True
    """What the field holds while it sleeps."""
    awake: Word = False

    def read(self, page: bytes | None) -> bool | None:
        """Whether it sleeps, by this answer; None: it says neither."""
        found = field_of(page, self.field) if page else None
        return True if same(found, self.asleep) else False if same(found, self.awake) else None


def field_of(page: bytes, name: str) -> object:
    """What a JSON object holds under a name; None: nothing, or it is none."""
    try:
        found = json.loads(page)
    except (ValueError, RecursionError):
        return None
    for step in name.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found


def same(found: object, wanted: Word) -> bool:
    """Equal, and of one kind: in JSON 1 is not true."""
    return type(found) is type(wanted) and found == wanted


class SleepLevel(Struct, frozen=True):
    """One way to give GPU memory back and keep the process."""

    sleep: tuple[EngineCall, ...]
    """Made in this order, each only after the one before it was answered as it should."""
    wake: tuple[EngineCall, ...]
    """The same."""
    keeps_weights: bool
    """They move to host memory."""
    sleep_s: float | None = None
    """Predicted time until its calls are answered, until history knows better; None: a part of a load."""
    wake_s: float | None = None
    """The same until it is ready again."""

    def predicted_s(self, load_s: float) -> tuple[float, float]:
        """Seconds to fall asleep and to wake up, for one that loads in so many, before anything was measured."""
        number = 1 if self.keeps_weights else 2
        return (
            SLEEP_PART[number] * load_s if self.sleep_s is None else self.sleep_s,
            WAKE_PART[number] * load_s if self.wake_s is None else self.wake_s,
        )


class EngineProfile(Discreet, frozen=True):
    """What is known of one engine. Its arguments and variables may hold `PLACEHOLDERS`, filled in at start."""

    discreet_about = frozenset({"env"})

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
    drain_args: tuple[str, ...] = ()
    """Added when requests in flight may finish: the engine's own drain, for those that are left at the signal."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables it is always started with."""
    sleep_args: tuple[str, ...] = ()
    """Added when it is to be evicted by sleep."""
    sleep_env: Mapping[str, str] = field(default_factory=dict)
    sleep_levels: Mapping[int, SleepLevel] = field(default_factory=dict)
    """How it frees its GPU memory and keeps its process; empty: it cannot."""
    residual_bytes: int = 0
    """Planned on each GPU for one that sleeps; it counts as asleep once NVML shows no more."""
    sleep_check: SleepCheck | None = None
    """How it is asked whether it sleeps, once it may; None: it cannot be asked, and its calls are believed."""
    health_path: str = "/health"
    """Answers 200 when ready."""
    metrics_path: str | None = None
    busy_metrics: tuple[str, ...] = ()
    """Their sum is the number of requests running and waiting; empty: the engine does not say."""
    running_metrics: tuple[str, ...] = ()
    """Their sum is the number of requests that are being worked on; empty: the engine does not say."""
    progress_metrics: tuple[str, ...] = ()
    """Their sum grows while any request is worked on: frozen with some running, it tells a hidden hang."""
    load_path: str | None = None
    """Answers `{"server_load": N}`: requests taken and not answered; None: it does not tell."""
    load_s: float = 30.0
    """Predicted start to ready, until history knows better."""
    drain_s: float = 5.0
    stop_s: float = 5.0
    stop_signal: str = "SIGTERM"
    """Unless the endpoint's `stop.signal` says otherwise; so `grace_s` and `startup_s`."""
    grace_s: float = 30.0
    startup_s: float = 900.0
    failures: tuple[FailurePattern, ...] = ()
    """What its log says when it ends by itself; the first that is found names the class."""
    titles: tuple[str, ...] = ()
    """Regular expressions of process titles: `doctor` knows by them what an engine left behind that nobody owns."""
    like: str | None = None
    """Name of the one that it is a variant of; None: of none."""

    @property
    def tells_port(self) -> bool:
        """Whether whom it starts is told where to listen."""
        return any("{port}" in part for part in (*self.model_args, *self.base_args, *self.env.values()))

    @property
    def sleeps(self) -> bool:
        """Whether it can free its GPU memory and keep its process."""
        return bool(self.sleep_levels)


# Both take port 9000 besides their own, which is then served on neither, and end where it is taken: of two on one box
# one would not start (text-embeddings-inference#477, text-generation-inference#3062). 0 is any that is free; older ones
# do not read it.
_ANY_PROMETHEUS_PORT = {"PROMETHEUS_PORT": "0"}

# The shards of a TGI meet on 29500 unless told otherwise ("Text-generation-launcher arguments", `--master-port`): of
# two sharded ones on a box one would not start (text-generation-inference#1156). A variable, so that `args` may say
# something else: the launcher takes an option but once. Others need none: vLLM (`get_open_port`) and SGLang
# (`--nccl-port`, sglang#7418) look for a port that is free.
_MEET_ON_SECOND_PORT = {"MASTER_PORT": "{second_port}"}

# Load and stop times: vLLM measured 27-98 s to ready, 0.4-0.9 s from SIGTERM to exit when idle; others by analogy.
PROFILES: Mapping[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        EngineProfile(
            name="vllm",
            executable="vllm",
            model_args=("serve", "{model}"),
            # without the tracking /load is always 0
            base_args=("--host", "{host}", "--port", "{port}", "--enable-server-load-tracking"),
            many_gpus_args=("--tensor-parallel-size", "{gpu_count}"),
            drain_args=("--shutdown-timeout", "{drain}"),  # without it the server can wait for minutes
            fraction_args=("--gpu-memory-utilization", "{fraction}"),
            sleep_args=("--enable-sleep-mode",),
            sleep_env={"VLLM_SERVER_DEV_MODE": "1"},
            sleep_levels={
                1: SleepLevel(
                    (EngineCall("/sleep?level=1"),),
                    (EngineCall("/wake_up"),),
                    keeps_weights=True,
                ),
                2: SleepLevel(
                    (EngineCall("/sleep?level=2"),),
                    (
                        EngineCall("/wake_up?tags=weights"),
                        EngineCall("/collective_rpc", '{"method": "reload_weights"}'),
                        EngineCall("/wake_up?tags=kv_cache"),
                    ),
                    keeps_weights=False,
                ),
            },
            residual_bytes=RESIDUAL,
            sleep_check=SleepCheck("/is_sleeping", "is_sleeping"),
            metrics_path="/metrics",
            busy_metrics=("vllm:num_requests_running", "vllm:num_requests_waiting"),
            running_metrics=("vllm:num_requests_running",),
            progress_metrics=("vllm:iteration_tokens_total_sum",),
            load_path="/load",
            load_s=60.0,
            drain_s=10.0,
            stop_s=10.0,
            failures=_PYTHON_FAILURES,
            titles=(r"VLLM::\w+", r"\bvllm serve\b"),
        ),
        EngineProfile(
            name="sglang",
            executable="sglang",
            model_args=("serve", "--model-path", "{model}"),
            base_args=("--host", "{host}", "--port", "{port}", "--enable-metrics"),  # off by default; drain needs them
            # else /health makes a token: it takes a second at least, fails in a long prefill (sglang#22511), and asleep
            env={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"},
            many_gpus_args=("--tp-size", "{gpu_count}"),
            fraction_args=("--mem-fraction-static", "{fraction}"),
            # without the backup the weights would be gone when it resumes
            sleep_args=("--enable-memory-saver", "--enable-weights-cpu-backup"),
            sleep_levels={
                1: SleepLevel(
                    (EngineCall("/release_memory_occupation", "{}"),),
                    (EngineCall("/resume_memory_occupation", "{}"),),
                    keeps_weights=True,
                ),
            },
            residual_bytes=RESIDUAL,
            metrics_path="/metrics",
            busy_metrics=("sglang:num_running_reqs", "sglang:num_queue_reqs"),
            load_s=60.0,
            drain_s=10.0,
            stop_s=10.0,
            failures=_PYTHON_FAILURES,
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
            failures=(
                FailurePattern(
                    r"cudaMalloc failed: out of memory|failed to allocate|unable to allocate",
                    "OutOfMemory",
                    "give it a larger GPU, or fewer layers with `--n-gpu-layers`",
                ),
                FailurePattern(
                    r"error: invalid argument|error while handling argument", "BadArgument", "correct `args:`"
                ),
                FailurePattern(
                    r"failed to load model|No such file or directory|failed to open GGUF",
                    "ModelNotFound",
                    "correct `model:`",
                ),
                FailurePattern(r"couldn't bind HTTP server socket", "PortTaken", "another process has its port"),
            ),
            titles=(r"\bllama-server\b",),
        ),
        EngineProfile(
            name="tgi",
            executable="text-generation-launcher",
            model_args=("--model-id", "{model}"),
            # two launchers share /tmp/text-generation-server unless told otherwise
            base_args=("--hostname", "{host}", "--port", "{port}", "--shard-uds-path", "/tmp/text-generation-{port}"),  # noqa: S108
            env={**_ANY_PROMETHEUS_PORT, **_MEET_ON_SECOND_PORT},
            many_gpus_args=("--num-shard", "{gpu_count}"),
            fraction_args=("--cuda-memory-fraction", "{fraction}"),
            metrics_path="/metrics",
            busy_metrics=("tgi_batch_current_size", "tgi_queue_size"),
            load_s=60.0,
            stop_s=10.0,
            failures=_PYTHON_FAILURES,
            titles=(r"\btext-generation-(?:launcher|router|server)\b",),
        ),
        EngineProfile(
            name="tei",
            executable="text-embeddings-router",
            model_args=("--model-id", "{model}"),
            base_args=("--hostname", "{host}", "--port", "{port}"),
            env=_ANY_PROMETHEUS_PORT,
            metrics_path="/metrics",
            busy_metrics=("te_queue_size",),
            load_s=20.0,
            stop_s=2.0,
            failures=_RUST_FAILURES,
            titles=(r"\btext-embeddings-router\b",),
        ),
        EngineProfile(name="custom", executable=None),
    )
}

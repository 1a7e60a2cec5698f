"""What is started for an endpoint."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spec_texts import BASE, read

from reconciler.errors import SpecError
from reconciler.spec.engines import Launch, capability_variable, endpoint_url, gpu_environment, launch
from reconciler.spec.profiles import PROFILES

GIB = 1 << 30


def start(fields: str, gpus: list[int], total: int = 24 * GIB) -> Launch:
    endpoint = read(f"version: 1\nendpoints:\n  a: {{{fields}}}\n").endpoints["a"]
    return launch(endpoint, gpu_indices=gpus, gpu_total_bytes=[total] * len(gpus), port=endpoint.port)


@pytest.mark.parametrize(
    ("fields", "gpus", "command"),
    [
        ("model: o/m, port: 80", [2], "vllm serve o/m --host 127.0.0.1 --port 80 --shutdown-timeout 15"),
        ("model: o/m, port: 80, stop: {drain: 0s}", [2], "vllm serve o/m --host 127.0.0.1 --port 80"),
        (
            "model: o/m, port: 80, gpus: 2",
            [0, 3],
            "vllm serve o/m --host 127.0.0.1 --port 80 --tensor-parallel-size 2 --shutdown-timeout 15",
        ),
        (
            "model: o/m, port: 80, memory: 0.45, args: [--seed, '1']",
            [0],
            "vllm serve o/m --host 127.0.0.1 --port 80 --gpu-memory-utilization 0.45 --shutdown-timeout 15 --seed 1",
        ),
        (
            "model: o/m, port: 80, memory: 16GiB",
            [0],
            "vllm serve o/m --host 127.0.0.1 --port 80 --gpu-memory-utilization 0.6666 --shutdown-timeout 15",
        ),
        (
            "model: o/m, port: 80, evict: {method: sleep}, executable: /opt/v",
            [0],
            "/opt/v serve o/m --host 127.0.0.1 --port 80 --shutdown-timeout 15 --enable-sleep-mode",
        ),
        (
            "model: o/m, port: 80, engine: sglang, gpus: 2, memory: 0.5",
            [0, 1],
            (
                "sglang serve --model-path o/m --host 127.0.0.1 --port 80 --enable-metrics"
                " --tp-size 2 --mem-fraction-static 0.5"
            ),
        ),
        (
            "model: o/m, port: 80, engine: sglang, evict: {method: sleep}",
            [0],
            (
                "sglang serve --model-path o/m --host 127.0.0.1 --port 80 --enable-metrics"
                " --enable-memory-saver --enable-weights-cpu-backup"
            ),
        ),
        (
            "model: o/m, port: 80, engine: tgi, gpus: 2, memory: 0.5",
            [0, 1],
            (
                "text-generation-launcher --model-id o/m --hostname 127.0.0.1 --port 80"
                " --shard-uds-path /tmp/text-generation-80 --num-shard 2 --cuda-memory-fraction 0.5"
            ),
        ),
        (
            "model: o/m, port: 80, engine: llamacpp",
            [0],
            "llama-server -hf o/m --host 127.0.0.1 --port 80 --metrics",
        ),
        (
            "model: /w/m.gguf, port: 80, engine: llamacpp",
            [0],
            "llama-server --model /w/m.gguf --host 127.0.0.1 --port 80 --metrics",
        ),
        (
            "model: o/m, port: 80, engine: tei, gpus: 0",
            [],
            "text-embeddings-router --model-id o/m --hostname 127.0.0.1 --port 80",
        ),
        (
            (
                "engine: custom, port: 80, model: '{port}', memory: 8GiB, gpus: 2, args: [end],"
                " command: [run, '{model}', 'p={port}', '{gpus}', '{memory}', '{\"a\": 1}', '{host}']"
            ),
            [1, 2],
            'run {port} p=80 1,2 8589934592 {"a": 1} {host} end',
        ),
        ("engine: custom, command: [run, '{memory}', '{gpus}x'], gpus: 0", [], "run  x"),
    ],
)
def test_the_command_line(fields: str, gpus: list[int], command: str) -> None:
    assert " ".join(start(fields, gpus).argv) == command


def test_a_process_sees_its_gpus_and_no_other() -> None:
    assert start("model: m, port: 1, gpus: 2, env: {HF_HOME: /x}", [4, 1]).env == {
        "CUDA_VISIBLE_DEVICES": "4,1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "SPT_NOENV": "1",
        "HF_HOME": "/x",
    }
    assert gpu_environment([])["CUDA_VISIBLE_DEVICES"] == ""
    assert start("model: m, port: 1, evict: {method: sleep}", [0]).env["VLLM_SERVER_DEV_MODE"] == "1"


@given(st.integers(1, 200 * GIB), st.lists(st.integers(8 * GIB, 192 * GIB), min_size=1, max_size=8))
def test_an_engine_is_never_granted_more_than_was_claimed(claim: int, totals: list[int]) -> None:
    endpoint = replace(read(BASE + f"    memory: {claim}B\n").endpoints["coding"])
    argv = launch(endpoint, gpu_indices=range(len(totals)), gpu_total_bytes=totals, port=1).argv
    fraction = float(argv[argv.index("--gpu-memory-utilization") + 1])
    assert 0 < fraction <= 1
    # 1e-6 of a GPU forgives 0.45 written as 0.45; the least fraction is what four places can say
    assert all(fraction * total <= claim + 1e-6 * total or fraction == 0.0001 for total in totals)


def test_every_profile_can_be_asked_and_predicted() -> None:
    for name, profile in PROFILES.items():
        assert profile.name == name
        assert profile.health_path.startswith("/")
        assert min(profile.load_s, profile.stop_s) > 0
        assert bool(profile.busy_metrics) == bool(profile.metrics_path)
        assert profile.sleeps or not profile.sleep_args


def test_urls_and_their_variables() -> None:
    assert endpoint_url(8080) == "http://127.0.0.1:8080"
    assert capability_variable("reasoning") == "RECONCILER_CAPABILITY_REASONING_URL"
    assert capability_variable("a.b-c") == "RECONCILER_CAPABILITY_A_B_C_URL"


OWN = """version: 1
engines:
  fast:
    like: vllm
    executable: /opt/fast/bin/vllm
    env: {FAST: "1"}
    startup: 20m
    grace: 45s
    failures: [{pattern: "kernel panic", kind: FastBroke, hint: reboot it}]
  whisper:
    executable: whisper-server
    model_args: [--weights, "{model}"]
    args: [--listen, "{host}:{port}", --devices, "{gpus}"]
    health_path: /up
    stop_signal: SIGINT
endpoints:
  a: {engine: fast, model: o/m, port: 80, evict: {method: sleep}}
  b: {engine: whisper, model: w, port: 81, stop: {grace: 5s}, gpus: 2}
"""


def test_a_profile_of_ones_own_is_a_variant_of_one_that_comes_with_the_program() -> None:
    spec = read(OWN)
    fast = spec.endpoints["a"]
    made = launch(fast, gpu_indices=[0], gpu_total_bytes=[24 * GIB], port=80)
    assert " ".join(made.argv) == (
        "/opt/fast/bin/vllm serve o/m --host 127.0.0.1 --port 80 --shutdown-timeout 15 --enable-sleep-mode"
    )
    assert (made.env["FAST"], made.env["VLLM_SERVER_DEV_MODE"]) == ("1", "1")
    assert (fast.health.startup_s, fast.stop.grace_s) == (1200.0, 45.0)
    assert fast.profile.sleeping_path == "/is_sleeping"
    assert fast.profile.failures[0].kind == "FastBroke"
    assert fast.profile.failures[1:] == PROFILES["vllm"].failures


def test_a_profile_of_ones_own_may_be_made_from_nothing() -> None:
    whisper = read(OWN).endpoints["b"]
    made = launch(whisper, gpu_indices=[1, 2], gpu_total_bytes=[24 * GIB] * 2, port=81)
    assert " ".join(made.argv) == "whisper-server --weights w --listen 127.0.0.1:81 --devices 1,2"
    assert (whisper.health.path, whisper.stop.signal, whisper.stop.grace_s) == ("/up", "SIGINT", 5.0)
    assert not whisper.profile.sleeps


def test_an_edit_of_a_profile_restarts_whom_it_starts_otherwise_and_nobody_else() -> None:
    before = read(OWN).endpoints
    told = read(OWN.replace("reboot it", "buy another")).endpoints
    assert {n: e.process_hash for n, e in told.items()} == {n: e.process_hash for n, e in before.items()}
    changed = read(OWN.replace("--listen", "--bind")).endpoints
    assert changed["a"].process_hash == before["a"].process_hash
    assert changed["b"].process_hash != before["b"].process_hash


@pytest.mark.parametrize(
    ("wrong", "at", "message"),
    [
        ("engines: {vllm: {}}", "2:11", "comes with the program"),
        ("engines: {x: {like: vlm}}", "2:21", 'unknown engine "vlm"'),
        ("engines: {x: {}}", "2:11", "no program to start"),
        ("engines: {x: {like: tei, titles: ['(']}}", "2:11", "no regular expression"),
        ("engines: {x: {executable: x, busy_metrics: [y]}}", "2:11", "no page of them"),
        ("engines: {x: {like: tei, comand: [y]}}", "2:26", "comand"),
    ],
)
def test_a_wrong_profile_is_an_error_at_its_place(wrong: str, at: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(f"version: 1\n{wrong}\nendpoints: {{}}\n")
    problem = caught.value.problems[0]
    assert f"{problem.line}:{problem.column}" == at
    assert message in problem.message


@pytest.mark.parametrize(
    ("engine", "said", "kind"),
    [
        ("vllm", "Free memory on device cuda:0 (1/24 GiB) on startup is less than desired", "OutOfMemory"),
        ("vllm", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "OutOfMemory"),
        ("vllm", "AssertionError: Error in memory profiling. Initial free memory", "MemoryChanged"),
        ("vllm", "usage: vllm serve [model_tag]\nvllm: error: unrecognized arguments: --no-such", "BadArgument"),
        ("vllm", "OSError: Can't load the configuration of '/nowhere'.", "ModelNotFound"),
        ("vllm", "OSError: x/y is not a local folder and is not a valid model identifier listed on", "ModelNotFound"),
        ("tgi", "huggingface_hub.errors.GatedRepoError: 401 Client Error.", "NoAccess"),
        ("sglang", "OSError: [Errno 98] Address already in use", "PortTaken"),
        ("llamacpp", "ggml_cuda: cudaMalloc failed: out of memory", "OutOfMemory"),
        ("llamacpp", "error: invalid argument: --nope", "BadArgument"),
        ("vllm", "INFO:     Application startup complete.", None),
    ],
)  # fmt: skip
def test_the_log_of_a_failed_start_tells_its_class(engine: str, said: str, kind: str | None) -> None:
    found = [f.kind for f in PROFILES[engine].failures if re.search(f.pattern, said)]
    assert found[:1] == ([kind] if kind else [])

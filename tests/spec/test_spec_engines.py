"""What is started for an endpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spec_texts import BASE, read

from reconciler.spec.engines import PROFILES, Launch, capability_variable, endpoint_url, gpu_environment, launch

GIB = 1 << 30


def start(fields: str, gpus: list[int], total: int = 24 * GIB) -> Launch:
    endpoint = read(f"version: 1\nendpoints:\n  a: {{{fields}}}\n").endpoints["a"]
    return launch(endpoint, gpu_indices=gpus, gpu_total_bytes=[total] * len(gpus), port=endpoint.port)


@pytest.mark.parametrize(
    ("fields", "gpus", "command"),
    [
        ("model: o/m, port: 80", [2], "vllm serve o/m --host 127.0.0.1 --port 80"),
        ("model: o/m, port: 80, gpus: 2", [0, 3], "vllm serve o/m --host 127.0.0.1 --port 80 --tensor-parallel-size 2"),
        (
            "model: o/m, port: 80, memory: 0.45, args: [--seed, '1']",
            [0],
            "vllm serve o/m --host 127.0.0.1 --port 80 --gpu-memory-utilization 0.45 --seed 1",
        ),
        (
            "model: o/m, port: 80, memory: 16GiB",
            [0],
            "vllm serve o/m --host 127.0.0.1 --port 80 --gpu-memory-utilization 0.6666",
        ),
        (
            "model: o/m, port: 80, evict: {method: sleep}, executable: /opt/v",
            [0],
            "/opt/v serve o/m --host 127.0.0.1 --port 80 --enable-sleep-mode",
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

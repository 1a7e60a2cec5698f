"""What is started for an endpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from spec_texts import BASE, read

from reconciler.errors import SpecError
from reconciler.spec.engines import Launch, capability_variable, endpoint_url, gpu_environment, launch, second_port
from reconciler.spec.profiles import PLACEHOLDERS, PROFILES, RESIDUAL, EngineCall, SleepCheck

GIB = 1 << 30


def start(fields: str, gpus: list[int], total: int = 24 * GIB) -> Launch:
    endpoint = read(f"version: 1\nendpoints:\n  a: {{{fields}}}\n").endpoints["a"]
    return launch(endpoint, gpu_indices=gpus, gpu_total_bytes=[total] * len(gpus), port=endpoint.port)


GIVEN = "o/m --host 127.0.0.1 --port 80 --enable-server-load-tracking"


@pytest.mark.parametrize(
    ("fields", "gpus", "command"),
    [
        (
            "model: o/m, port: 80",
            [2],
            f"vllm serve {GIVEN} --shutdown-timeout 15",
        ),
        (
            "model: o/m, port: 80, stop: {drain: 0s}",
            [2],
            f"vllm serve {GIVEN}",
        ),
        (
            "model: o/m, port: 80, gpus: 2",
            [0, 3],
            f"vllm serve {GIVEN} --tensor-parallel-size 2 --shutdown-timeout 15",
        ),
        (
            "model: o/m, port: 80, memory: 0.45, args: [--seed, '1']",
            [0],
            f"vllm serve {GIVEN} --gpu-memory-utilization 0.45 --shutdown-timeout 15 --seed 1",
        ),
        (
            "model: o/m, port: 80, memory: 16GiB",
            [0],
            f"vllm serve {GIVEN} --gpu-memory-utilization 0.6666 --shutdown-timeout 15",
        ),
        (
            "model: o/m, port: 80, evict: {method: sleep}, executable: /opt/v",
            [0],
            f"/opt/v serve {GIVEN} --shutdown-timeout 15 --enable-sleep-mode",
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


@pytest.mark.parametrize("engine", ["tgi", "tei"])
def test_two_of_an_engine_with_a_port_for_metrics_besides_its_own_do_not_meet_there(engine: str) -> None:
    assert start(f"engine: {engine}, model: m, port: 1", [0]).env["PROMETHEUS_PORT"] == "0"
    asked = start(f"engine: {engine}, model: m, port: 1, env: {{PROMETHEUS_PORT: '9100'}}", [0])
    assert asked.env["PROMETHEUS_PORT"] == "9100"


def test_two_sharded_tgi_meet_on_ports_of_their_own_unless_told_otherwise() -> None:
    ports = [start(f"engine: tgi, model: m, port: {port}, gpus: 2", [0, 1]).env["MASTER_PORT"] for port in (8080, 8081)]
    assert ports == ["24464", "24465"]
    asked = start("engine: tgi, model: m, port: 8080, gpus: 2, env: {MASTER_PORT: '30000'}", [0, 1])
    assert asked.env["MASTER_PORT"] == "30000"


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_second_ports_are_unprivileged_and_nobodys_but_of_ports_that_are_privileged_or_next_to_them(
    one: int, other: int
) -> None:
    assert 1024 <= second_port(one) <= 65535
    assert second_port(one) != one
    if one != other and not (17408 > one >= 16384 or 17408 > other >= 16384):
        assert second_port(one) != second_port(other)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            "port: 8080, gpus: 2",
            "port: 24464",
            '24464 is already taken by endpoint "a", where its GPUs\' processes meet',
        ),
        (
            "port: 24464",
            "port: 8080, gpus: 2",
            '24464, where its GPUs\' processes meet, is already taken by endpoint "a"',
        ),
        ("port: 8080, gpus: 2", "port: 24464, engine: vllm", "is already taken by"),
        ("port: 8080, gpus: 1", "port: 24464", None),
        ("port: 8080, gpus: 2, env: {MASTER_PORT: '1'}", "port: 24464", None),
        ("port: 8080, gpus: 2, engine: vllm", "port: 24464", None),
    ],
)
def test_a_port_where_processes_meet_is_not_given_to_another(a: str, b: str, message: str | None) -> None:
    text = f"version: 1\ndefaults: {{engine: tgi, model: m}}\nendpoints:\n  a: {{{a}}}\n  b: {{{b}}}\n"
    if message is None:
        assert set(read(text).endpoints) == {"a", "b"}
        return
    with pytest.raises(SpecError) as caught:
        read(text)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert (problem.line, problem.column) == (5, text.splitlines()[4].index("port: ") + 7)


def test_the_health_of_sglang_is_not_asked_by_having_it_make_a_token() -> None:
    """Busy with a long prompt, or asleep, it would not answer, and be restarted for that."""
    asked = start("engine: sglang, model: m, port: 1", [0])
    assert asked.env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"


@pytest.mark.parametrize("engine", PROFILES)
def test_every_engine_sees_its_gpus_in_the_order_of_the_bus_and_keeps_its_marker(engine: str) -> None:
    command = "command: [run]" if engine == "custom" else "model: m"
    env = start(f"engine: {engine}, {command}, port: 1, gpus: 2", [3, 1]).env
    assert {"CUDA_VISIBLE_DEVICES": "3,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "SPT_NOENV": "1"}.items() <= env.items()


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
    assert " ".join(made.argv) == (f"/opt/fast/bin/vllm serve {GIVEN} --shutdown-timeout 15 --enable-sleep-mode")
    assert (made.env["FAST"], made.env["VLLM_SERVER_DEV_MODE"]) == ("1", "1")
    assert (fast.health.startup_s, fast.stop.grace_s) == (1200.0, 45.0)
    assert fast.profile.sleep_check == PROFILES["vllm"].sleep_check
    assert fast.profile.failures[0].kind == "FastBroke"
    assert fast.profile.failures[1:] == PROFILES["vllm"].failures


def test_a_profile_of_ones_own_may_be_made_from_nothing() -> None:
    whisper = read(OWN).endpoints["b"]
    made = launch(whisper, gpu_indices=[1, 2], gpu_total_bytes=[24 * GIB] * 2, port=81)
    assert " ".join(made.argv) == "whisper-server --weights w --listen 127.0.0.1:81 --devices 1,2"
    assert (whisper.health.path, whisper.stop.signal, whisper.stop.grace_s) == ("/up", "SIGINT", 5.0)
    assert not whisper.profile.sleeps


DOZER = """version: 1
engines:
  dozer:
    executable: /opt/dozer
    model_args: ["{model}"]
    load: 90s
    sleep:
      args: [--can-doze]
      env: {DOZE: "yes"}
      check: {path: /power, field: power.state, asleep: suspended, awake: running}
      level_1:
        sleep: [{path: "/power?to=suspended", method: PUT, status: 202, answer: {accepted: true}}]
        wake: [{path: /power, method: PUT, body: {to: running, warm: [1, null]}}, {path: /warm}]
        wake_time: 4s
      level_2:
        sleep: [{path: /drop}]
        wake: [{path: /load}]
endpoints:
  a: {engine: dozer, model: o/m, port: 80, evict: {method: sleep}}
  b: {engine: dozer, model: o/m, port: 81}
"""


def test_a_profile_of_ones_own_says_how_it_sleeps_and_wakes() -> None:
    spec = read(DOZER)
    profile = spec.endpoints["a"].profile
    started = {n: launch(e, gpu_indices=[0], gpu_total_bytes=[GIB], port=e.port) for n, e in spec.endpoints.items()}
    assert started["a"].argv == ("/opt/dozer", "o/m", "--can-doze")
    assert started["a"].env["DOZE"] == "yes"
    assert started["b"].argv == ("/opt/dozer", "o/m")
    assert "DOZE" not in started["b"].env
    assert profile.sleep_check == SleepCheck("/power", "power.state", "suspended", "running")
    parked, dropped = profile.sleep_levels[1], profile.sleep_levels[2]
    assert parked.sleep == (EngineCall("/power?to=suspended", None, "PUT", 202, {"accepted": True}),)
    assert parked.wake == (
        EngineCall("/power", '{"to": "running", "warm": [1, null]}', "PUT"),
        EngineCall("/warm"),
    )
    assert (parked.keeps_weights, dropped.keeps_weights) == (True, False)
    assert (parked.predicted_s(50.0), dropped.predicted_s(50.0)) == ((4.0, 4.0), (1.5, 20.0))
    assert profile.residual_bytes == RESIDUAL  # NVML would never show that it holds nothing


def test_the_profiles_shown_in_the_documentation_are_accepted() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts.md").read_text()
    shown = re.search(r"```yaml\n(engines:\n.*?)```", page, re.DOTALL)
    assert shown
    whisper = "endpoints:\n  a: {engine: whisper, model: m, port: 80}\n"
    profile = read(f"version: 1\n{shown[1]}" + whisper).endpoints["a"].profile
    assert profile.sleeps


def test_a_variant_keeps_the_ways_to_sleep_that_it_does_not_write_anew() -> None:
    mine = "{like: vllm, residual: 2GiB, sleep: {level_2: {sleep: [{path: /a}], wake: [{path: /b}]}}}"
    endpoints = "\nendpoints:\n  a: {engine: mine, model: o/m, port: 80}\n"
    profile = read(f"version: 1\nengines:\n  mine: {mine}{endpoints}").endpoints["a"].profile
    vllm = PROFILES["vllm"]
    assert profile.sleep_levels[1] == vllm.sleep_levels[1]
    assert profile.sleep_levels[2].wake == (EngineCall("/b"),)
    assert (profile.sleep_check, profile.sleep_args) == (vllm.sleep_check, vllm.sleep_args)
    assert (profile.sleep_env, profile.residual_bytes) == (vllm.sleep_env, 2 * GIB)


@pytest.mark.parametrize(
    ("field", "page", "says"),
    [
        ("power.state", b'{"power": {"state": "suspended"}}', True),
        ("power.state", b'{"power": {"state": "running"}}', False),
        ("power.state", b'{"power": {"state": "starting"}}', None),
        ("power.state", b'{"power": "suspended"}', None),
        ("power.state", b"[" * 100_000, None),
        ("power.state", b"\xff", None),
        ("power.state", None, None),
    ],
)
def test_a_check_believes_its_two_words_and_nothing_else(field: str, page: bytes | None, says: bool | None) -> None:
    assert SleepCheck("/power", field, "suspended", "running").read(page) is says


@pytest.mark.parametrize(
    ("call", "status", "page", "wrong"),
    [
        (EngineCall("/x"), 204, b"", None),
        (EngineCall("/x"), 302, b"", "answered 302"),
        (EngineCall("/x", status=302), 302, b"", None),
        (EngineCall("/x", status=202), 200, b"", "answered 200"),
        (EngineCall("/x", answer={"success": True}), 200, b'{"success": true, "n": 1}', None),
        (EngineCall("/x", answer={"success": True}), 200, b'{"success": 1}', "answered success: 1"),
        (EngineCall("/x", answer={"success": True}), 200, b"ok", "answered success: None"),
    ],
)
def test_a_call_is_answered_as_it_should_or_says_what_is_wrong(
    call: EngineCall, status: int, page: bytes, wrong: str | None
) -> None:
    assert call.lacks(status, page) == wrong


def test_an_edit_of_a_profile_restarts_whom_it_starts_otherwise_and_nobody_else() -> None:
    before = read(OWN).endpoints
    told = read(OWN.replace("reboot it", "buy another")).endpoints
    assert {n: e.process_hash for n, e in told.items()} == {n: e.process_hash for n, e in before.items()}
    changed = read(OWN.replace("--listen", "--bind")).endpoints
    assert changed["a"].process_hash == before["a"].process_hash
    assert changed["b"].process_hash != before["b"].process_hash


def sleeping_by(call: str) -> str:
    """A profile whose engine sleeps by this call."""
    return f"engines: {{x: {{like: vllm, sleep: {{level_1: {{sleep: [{call}], wake: [{{path: /a}}]}}}}}}}}"


@pytest.mark.parametrize(
    ("wrong", "at", "message"),
    [
        ("engines: {vllm: {}}", "2:11", "comes with the program"),
        ("engines: {x: {like: vlm}}", "2:21", 'unknown engine "vlm"'),
        ("engines: {x: {}}", "2:11", "no program to start"),
        ("engines: {x: {like: tei, titles: ['(']}}", "2:11", "no regular expression"),
        ("engines: {x: {executable: x, busy_metrics: [y]}}", "2:11", "no page of them"),
        ("engines: {x: {like: tei, args: [a, '--port={prot}']}}", "2:36", "unknown placeholder {prot}"),
        ("engines: {x: {like: tei, many_gpus_args: ['{gpus}{GPUS}']}}", "2:43", "unknown placeholder {GPUS}"),
        ("engines: {x: {like: vllm, sleep: {args: ['{Port}']}}}", "2:42", "unknown placeholder {Port}"),
        ("engines: {x: {like: tei, env: {A: '{hunter2}'}}}", "2:35", "placeholder in the value of a variable"),
        ("engines: {x: {like: tei, comand: [y]}}", "2:26", "comand"),
        ("engines: {x: {like: tei, sleep: {args: [y]}}}", "2:26", "no way to sleep"),
        ("engines: {x: {like: tei, sleep: {level_1: {sleep: [{path: /a}]}}}}", "2:34", '"wake" is missing'),
        ("engines: {x: {like: tei, sleep: {level_1: {sleep: [], wake: [{path: /a}]}}}}", "2:51", "nothing in it"),
        (sleeping_by("{pth: /a}"), "2:53", '"path" is missing'),
        (sleeping_by("{path: }"), "2:54", "no value"),
        (sleeping_by("{path: a}"), "2:60", "path of"),
        ("engines: {x: {like: vllm, sleep: {check: {path: /a, field: s, asleep: 1.5}}}}", "2:71", "is no text"),
        ("engines: {x: {like: vllm, sleep: {check: {path: /a, field: s, asleep: false}}}}", "2:27", "sleeps or not"),
        ("engines: {x: {like: vllm, sleep: {level_3: {}}}}", "2:35", "level_3"),
        (
            "engines: {x: {sleep: {level_1: {wake: [{path: /w}], sleep: [{path: /a, answer: {a: null}}]}}}}",
            "2:81",
            "no value",
        ),
        ("engines: {x: {like: vllm, env: {CUDA_VISIBLE_DEVICES: '1'}}}", "2:33", "belongs to the reconciler"),
        ("engines: {x: {like: vllm, sleep: {env: {'A B': '1'}}}}", "2:41", "not the name of a variable"),
        ("engines: {x: {like: vllm, busy_metrics: ['r{m=\"a\"}']}}", "2:42", "not the name of a metric"),
    ],
)
def test_a_wrong_profile_is_an_error_at_its_place(wrong: str, at: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(f"version: 1\n{wrong}\nendpoints: {{}}\n")
    problem = caught.value.problems[0]
    assert f"{problem.line}:{problem.column}" == at
    assert message in problem.message


def test_what_can_be_filled_in_is_told_and_braces_that_mean_something_else_are_left_alone() -> None:
    engines = """version: 1
engines:
  x:
    executable: x
    model_args: ["{model}"]
    args: %s
    env: {WHERE: "{host}:{port}", ALL: '%s', J: '{"port": {port}}'}
    sleep: {args: ["--wake={port}"], env: {NAP: "{gpu_count}"}, level_1: {sleep: [{path: /a}], wake: [{path: /b}]}}
endpoints: {a: {engine: x, model: m, port: 80, memory: 0.5, evict: {method: sleep}, args: ["{prot}"], env: {K: "{x}"}}}
"""
    every = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    kept = ["""'{"a": 1}'""", "'${HOME} {{ x }} {{y}} {3} {} { port } {a.b}'"]
    endpoint = read(engines % (f"[{', '.join(kept)}]", every)).endpoints["a"]
    made = launch(endpoint, gpu_indices=[3], gpu_total_bytes=[GIB], port=80)
    assert made.argv == ("x", "m", '{"a": 1}', "${HOME} {{ x }} {{y}} {3} {} { port } {a.b}", "--wake=80", "{prot}")
    assert made.env["WHERE"] == "127.0.0.1:80"
    assert made.env["ALL"] == f"127.0.0.1 80 16464 m 3 1 {GIB // 2} 0.5 15"
    assert (made.env["J"], made.env["NAP"], made.env["K"]) == ('{"port": 80}', "1", "{x}")
    with pytest.raises(SpecError) as caught:
        read(engines % ("['{prot}']", every))
    assert f"known: {every};" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize(
    ("engine", "endpoint", "told"),
    [
        ("args: [--max-num-seqs, '4']", "", False),
        ("args: []", "", False),
        ("args: []", "env: {WHERE: '81'}, args: ['8']", False),
        ("executable: y", "", True),
        ("args: ['--listen=:{port}']", "", True),
        ("args: [], model_args: [serve, '{model}', -p, '{port}']", "", True),
        ("args: [], env: {PORT: '{port}'}", "", True),
        ("args: []", "args: [-p, '8000']", True),
        ("args: []", "env: {WHERE: ':8000'}", True),
    ],
)
def test_a_variant_whose_arguments_lose_the_port_is_an_error_where_it_is_used(
    engine: str, endpoint: str, told: bool
) -> None:
    text = f"""version: 1
engines: {{x: {{like: vllm, {engine}}}}}
endpoints:
  a: {{engine: x, model: m, port: 8000, {endpoint}}}
  b: {{engine: vllm, model: m, port: 8001}}
"""
    if told:
        assert set(read(text).endpoints) == {"a", "b"}
        return
    with pytest.raises(SpecError) as caught:
        read(text)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == (4, 15)
    assert 'endpoint "a" is not told its port: the args of engine x replace those of vllm' in problem.message
    assert "--host {host} --port {port}" in str(problem.hint)


@pytest.mark.parametrize("wrong", ["{like: vlm}", "{like: vllm, startup: 0s}", "{}"])
def test_who_uses_a_broken_profile_is_not_said_to_use_an_unknown_one(wrong: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(f"version: 1\nengines: {{x: {wrong}}}\nendpoints: {{a: {{model: m, port: 1, engine: x}}}}\n")
    assert [problem.line for problem in caught.value.problems] == [2]


@pytest.mark.parametrize(
    ("engine", "said", "kind"),
    [
        ("vllm", "Free memory on device cuda:0 (1/24 GiB) on startup is less than desired", "OutOfMemory"),
        ("vllm", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "OutOfMemory"),
        ("vllm", "AssertionError: Error in memory profiling. Initial free memory", "MemoryChanged"),
        ("vllm", "ValueError: No available memory for the cache blocks. Try increasing", "OutOfMemory"),
        ("vllm", ("ValueError: To serve at least one request with the models's max seq len (32768), (3.50 GiB KV cache "
                "is needed, which is larger than the available KV cache memory (1.20 GiB)."), "OutOfMemory"),
        ("vllm", "usage: vllm serve [model_tag]\nvllm: error: unrecognized arguments: --no-such", "BadArgument"),
        ("vllm", "OSError: Can't load the configuration of '/nowhere'.", "ModelNotFound"),
        ("vllm", "OSError: x/y is not a local folder and is not a valid model identifier listed on", "ModelNotFound"),
        ("vllm", "huggingface_hub.errors.GatedRepoError: 401 Client Error.", "NoAccess"),
        ("vllm", "OSError: [Errno 98] Address already in use", "PortTaken"),
        ("tgi", "huggingface_hub.errors.GatedRepoError: 401 Client Error.", "NoAccess"),
        ("tgi", "error: unexpected argument '--nope' found\n\nUsage: text-generation-launcher", "BadArgument"),
        ("tgi", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "OutOfMemory"),
        ("tei", "INFO Args {}\nerror: invalid value 'x' for '--port <PORT>': invalid digit", "BadArgument"),
        ("tei", 'Error: DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")', "OutOfMemory"),
        ("tei", ("Error: failed to build prometheus recorder\n\nCaused by:\n    failed to create HTTP listener: "
                "Address already in use (os error 98)"), "PortTaken"),
        ("tei", ("Error: Could not download model artifacts\n\nCaused by:\n    0: request error: HTTP status client "
                "error (401 Unauthorized) for url (https://huggingface.co/o/m/resolve/main/config.json)"), "NoAccess"),
        ("tei", ("Error: Could not download model artifacts\n\nCaused by:\n    0: request error: HTTP status client "
                "error (404 Not Found) for url (https://huggingface.co/o/m/config.json)"), "ModelNotFound"),
        ("tei", "WARN Could not download `model.onnx`: request error: HTTP status client error (404 Not Found)", None),
        ("llamacpp", "couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 80", "PortTaken"),
        ("llamacpp", "main: error: failed to load model '/w/m.gguf'", "ModelNotFound"),
        ("sglang", "OSError: [Errno 98] Address already in use", "PortTaken"),
        ("llamacpp", "ggml_cuda: cudaMalloc failed: out of memory", "OutOfMemory"),
        ("llamacpp", "error: invalid argument: --nope", "BadArgument"),
        ("vllm", "INFO:     Application startup complete.", None),
    ],
)  # fmt: skip
def test_the_log_of_a_failed_start_tells_its_class(engine: str, said: str, kind: str | None) -> None:
    found = [f.kind for f in PROFILES[engine].failures if re.search(f.pattern, said)]
    assert found[:1] == ([kind] if kind else [])

"""What accepted texts mean."""

from __future__ import annotations

from random import Random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from spec_texts import BASE, overlay, read

from reconciler.spec.checks import check_against_node
from reconciler.spec.env_file import parse_env_file
from reconciler.spec.load import SourceText, merge_live_edit, rejected_overlays, resolve
from reconciler.spec.spec import GpuCount, GpuPins, Health, Logs, MemoryBytes, MemoryFraction, Restart, Stop, WholeGpu

JOB = "version: 1\npriority: 600\nmakespan: {duration: 20m}\ngpus: 1\nworkload: {command: [render, a]}\n"


def test_what_is_left_out_has_its_default() -> None:
    spec = read(BASE)
    coding = spec.endpoints["coding"]
    assert (coding.health, coding.stop, coding.restart) == (Health(), Stop(), Restart())
    assert (coding.engine, coding.executable, coding.cwd) == ("vllm", None, "/etc/box")
    assert (coding.gpus, coding.memory, coding.priority) == (GpuCount(1), WholeGpu(), 500)
    assert (coding.state, coding.preemptible, coding.movable) == ("running", True, False)
    assert (spec.node.name, spec.node.reserve_bytes) == ("box", 1 << 30)
    assert (spec.policy.max_evictions_per_hour, spec.policy.min_ready_s, spec.policy.resync_s) == (3, 120, 10)


def test_what_is_written_is_what_is_meant() -> None:
    thinking = read(BASE).endpoints["thinking"]
    assert thinking.gpus == GpuPins((0, 1))
    assert thinking.priority == 900
    assert thinking.capabilities == ("chat", "reasoning")
    assert thinking.args == ("--max-model-len", "4096")
    assert str(thinking.source) == "/etc/box/setpoints.yaml:5"


@pytest.mark.parametrize(
    ("written", "meant"),
    [("0.45", MemoryFraction(0.45)), ("1.0", MemoryFraction(1.0)), ('"0.45"', MemoryFraction(0.45)),
     ("20GiB", MemoryBytes(20 << 30)), ("20GB", MemoryBytes(20 * 10**9)), ("512MiB", MemoryBytes(512 << 20))],
)  # fmt: skip
def test_memory_is_a_size_or_a_fraction(written: str, meant: object) -> None:
    assert read(BASE + f"    memory: {written}\n").endpoints["coding"].memory == meant


@pytest.mark.parametrize(
    ("written", "seconds"), [("30s", 30), ("1d12h", 129600), ("PT5M", 300), ("1.5h", 5400), ("0s", 0)]
)
def test_durations_are_read_in_both_spellings(written: str, seconds: float) -> None:
    assert read(BASE + f"    stop: {{grace: {written}}}\n").endpoints["coding"].stop.grace_s == seconds


def test_defaults_reach_every_endpoint_and_lose_to_what_it_says() -> None:
    text = BASE.replace(
        "endpoints:", "defaults: {priority: 7, stop: {grace: 9s, drain: 1s}, env: {A: a, B: b}, args: [x]}\nendpoints:"
    )
    spec = read(text + "    stop: {drain: 2s}\n    env: {B: c}\n    args: []\n")
    coding, thinking = spec.endpoints["coding"], spec.endpoints["thinking"]
    assert (coding.priority, thinking.priority) == (7, 900)
    assert (coding.stop.grace_s, coding.stop.drain_s, thinking.stop.drain_s) == (9, 2, 1)
    assert (coding.env, coding.args) == ({"A": "a", "B": "c"}, ())


def test_sections_with_everything_commented_out_are_empty() -> None:
    text = "version: 1\nnode:\npriorities:\ndefaults:\nendpoints:\n  # none yet\n"
    assert read(text).endpoints == {}


# ---------------------------------------------------------------- overlays


def test_grace_is_a_tenth_and_at_least_a_minute() -> None:
    assert overlay(JOB).makespan.grace_s == 120
    assert overlay(JOB.replace("20m", "1m")).makespan.grace_s == 60
    assert overlay(JOB.replace("20m", "20m, grace: 0s")).makespan.grace_s == 0
    assert overlay(JOB).makespan.starting_deadline_s == 3600


@pytest.mark.parametrize(
    ("start", "epoch"),
    [("2026-11-23T22:00:00+01:00", 1795467600), ("2026-11-23T21:00:00Z", 1795467600), ("2026-11-23 22:00", 1795467600),
     ("2026-10-25T02:30:00", 1792888200)],  # the first of two 02:30s
)  # fmt: skip
def test_a_time_without_offset_is_read_in_the_time_zone(start: str, epoch: float) -> None:
    job = overlay(JOB.replace("20m", f"20m, timezone: Europe/Berlin, start: {start}"))
    assert job.makespan.start == epoch


def test_set_is_laid_on_the_endpoint_as_written() -> None:
    job = overlay(JOB + "set:\n  thinking: {args: [y], stop: {grace: 5s}, gpus: 2}\n  coding: {state: stopped}\n")
    base = read(BASE).endpoints
    thinking = job.endpoints["thinking"]
    assert (thinking.args, thinking.gpus, thinking.stop) == (("y",), GpuCount(2), Stop(grace_s=5))
    assert (thinking.model, thinking.priority, thinking.port) == ("org/big", 900, 8080)
    assert replace(job.endpoints["coding"], state="running", source=base["coding"].source) == base["coding"]
    assert job.endpoints["coding"].source.file == "/etc/box/overlays/job.yaml"


def test_a_temporary_endpoint_may_take_the_port_of_one_that_is_stopped() -> None:
    extra = "set:\n  thinking: {state: stopped}\n  open: {model: m, port: 8080, capabilities: [odd]}\nrequires: [odd]\n"
    job = overlay(JOB + extra)
    assert (job.endpoints["open"].port, job.requires) == (8080, ("odd",))
    assert job.endpoints["open"].cwd == "/etc/box/overlays"


def test_rejected_overlays_are_named() -> None:
    assert rejected_overlays(read(BASE, {"bad.yaml": "{", "job.yaml": JOB})) == {"bad"}


def test_an_edit_while_running_moves_end_priority_and_policies_only() -> None:
    running = overlay(JOB + "set: {coding: {state: stopped}}\nrequires: [chat]\n")
    edited = overlay(
        JOB.replace("20m", "40m, grace: 7m, on_overrun: stop, start: 2026-11-23T21:00:00Z")
        .replace("600", "700")
        .replace("gpus: 1", "gpus: [3]\nmemory: 8GiB\nallow_baseline_eviction: true\non_edit: replace")
        .replace("a]}", "b], retries: 3, preemptible: true}")
    )
    merged = merge_live_edit(running, edited)
    assert (merged.priority, merged.allow_baseline_eviction, merged.on_edit) == (700, True, "replace")
    assert (merged.makespan.duration_s, merged.makespan.grace_s, merged.makespan.on_overrun) == (2400, 420, "stop")
    assert merged.makespan.start is None
    assert (merged.gpus, merged.memory, merged.requires) == (GpuCount(1), WholeGpu(), ("chat",))
    assert merged.endpoints == running.endpoints
    assert merged.workload is not None
    assert (merged.workload.command, merged.workload.retries, merged.workload.preemptible) == (("render", "a"), 3, True)
    assert merged.placement_hash == running.placement_hash
    assert merged.change_pending


# ---------------------------------------------------------------- hashes


def test_comments_order_and_spelling_do_not_change_the_digest() -> None:
    other = """\
# the same
priorities: {standing: 0x384}
endpoints:
  "coding": {port: 8081, gpus: 1, model: "org/code", capabilities: [code], stop: {grace: 0.5m}}
  thinking:
    priority: 900
    port: 8080
    gpus: [0, 1]
    capabilities: [chat, reasoning]
    model: org/big
    args:
    - --max-model-len
    - '4096'
node: {reserve: 1024MiB, gpus: [0, 1, 2, 3]}
version: 1
x-mine: anything
"""
    assert read(other).digest == read(BASE).digest
    assert read(other).endpoints == {
        name: replace(endpoint, source=read(other).endpoints[name].source)
        for name, endpoint in read(BASE).endpoints.items()
    }


def test_the_order_of_files_does_not_change_the_spec() -> None:
    jobs = [SourceText(f"/etc/box/overlays/{name}.yaml", JOB) for name in "abc"]
    base = SourceText("/etc/box/setpoints.yaml", BASE)

    def spec(files: list[SourceText]) -> object:
        return resolve(base, files, hostname="h", read_env_file=lambda _path: b"")

    assert spec(jobs) == spec(jobs[::-1])


def test_what_is_kept_of_logs_is_said_once_for_all_and_otherwise_for_one() -> None:
    said = "defaults: {logs: {max: 8MiB, keep: 3}}\nendpoints:\n"
    text = BASE.replace("endpoints:\n", said).replace("    port: 8081\n", "    port: 8081\n    logs: {max: 2MiB}\n")
    spec = read(text)
    assert spec.endpoints["thinking"].logs == Logs(8 << 20, 3)
    assert spec.endpoints["coding"].logs == Logs(2 << 20, 3)
    assert read(BASE).endpoints["coding"].logs == Logs(64 << 20, 20)
    workload = overlay(JOB.replace("a]}", "a], logs: {keep: 5}}")).workload
    assert workload is not None
    assert workload.logs == Logs(64 << 20, 5)


NEEDS_PROCESS = {"model": "n", "port": "9", "args": "[a]", "env": "{A: b}", "cwd": "/srv", "executable": "/bin/v",
                 "gpus": "2", "memory": "0.5", "engine": "sglang"}  # fmt: skip
NEEDS_NONE = {"priority": "3", "capabilities": "[zz]", "state": "stopped", "preemptible": "false",
              "health": "{startup: 1m}", "stop": "{grace: 1s}", "restart": "{max: 1m}", "evict": "{method: sleep}",
              "logs": "{max: 1MiB}", "gpus": "[3]"}  # fmt: skip
CODING = "version: 1\nendpoints:\n  coding:\n    env: {}\n"


def written(fields: dict[str, str]) -> str:
    base = {"model": "m", "port": "8081", "gpus": "1"}
    return "version: 1\nendpoints:\n  coding: {" + ", ".join(f"{k}: {v}" for k, v in {**base, **fields}.items()) + "}\n"


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(NEEDS_NONE)), st.none()))
def test_the_process_hash_ignores_what_a_running_process_can_live_with(chosen: dict[str, None]) -> None:
    spec = read(written({key: NEEDS_NONE[key] for key in chosen}))
    assert spec.endpoints["coding"].process_hash == read(written({})).endpoints["coding"].process_hash
    assert (spec.digest != read(written({})).digest) == bool(chosen)


@settings(deadline=None, max_examples=60)
@given(st.sets(st.sampled_from(sorted(NEEDS_PROCESS)), min_size=1))
def test_the_process_hash_covers_what_needs_a_new_process(chosen: set[str]) -> None:
    spec = read(written({key: NEEDS_PROCESS[key] for key in chosen}))
    assert spec.endpoints["coding"].process_hash != read(written({})).endpoints["coding"].process_hash


def test_each_meaning_has_a_process_hash_of_its_own() -> None:
    texts = [written({}), *(written({key: value}) for key, value in NEEDS_PROCESS.items())]
    assert len({read(text).endpoints["coding"].process_hash for text in texts}) == len(texts)


def test_the_content_of_an_env_file_is_in_the_hashes_and_nowhere_else() -> None:
    text, job = BASE + "    env_file: s.env\n", JOB.replace("a]}", "a], env_file: j.env}")

    def spec(a: bytes, b: bytes) -> object:
        return read(text, {"job.yaml": job}, {"/etc/box/s.env": a, "/etc/box/overlays/j.env": b})

    one, same, other = spec(b"K=hunter2\n", b"J=x"), spec(b"# x\nexport K='hunter2'\n", b"J=x\n"), spec(b"K=3", b"J=y")
    assert one == same
    assert one.endpoints["coding"].process_hash != other.endpoints["coding"].process_hash  # type: ignore[attr-defined]
    assert one.overlays["job"].placement_hash != other.overlays["job"].placement_hash  # type: ignore[attr-defined]
    assert one.digest != other.digest  # type: ignore[attr-defined]
    assert "hunter2" not in repr(one)


def test_the_placement_hash_covers_what_cannot_move_while_it_runs() -> None:
    base = overlay(JOB).placement_hash
    changes = {
        "gpus": JOB.replace("gpus: 1", "gpus: [1]"),
        "memory": JOB + "memory: 3GiB\n",
        "command": JOB.replace("a]", "b]"),
        "env": JOB.replace("a]}", "a], env: {A: b}}"),
        "cwd": JOB.replace("a]}", "a], cwd: /}"),
        "requires": JOB + "requires: [chat]\n",
        "set": JOB + "set: {coding: {state: stopped}}\n",
        "another set": JOB + "set: {coding: {priority: standing}}\n",
    }
    hashes = {name: overlay(text).placement_hash for name, text in changes.items()}
    assert len({base, *hashes.values()}) == len(changes) + 1
    for text in (
        JOB.replace("600", "601"),
        JOB.replace("20m", "21m, on_overrun: stop"),
        JOB + "on_edit: replace\nallow_baseline_eviction: true\n",
        JOB.replace("a]}", "a], retries: 2, preemptible: true, stop: {grace: 1s}, logs: {keep: 1}}"),
    ):
        assert overlay(text).placement_hash == base


def test_an_edit_of_the_baseline_is_no_edit_of_the_overlay() -> None:
    job = JOB + "set: {coding: {state: stopped, priority: standing}}\n"
    edited = BASE.replace("org/code", "org/newer").replace("endpoints:", "defaults: {env: {A: b}}\nendpoints:")
    assert overlay(job, edited).placement_hash == overlay(job).placement_hash
    assert overlay(job, BASE.replace("standing: 900", "standing: 800")).placement_hash != overlay(job).placement_hash


# ---------------------------------------------------------------- the box, and secrets


def test_claims_that_the_box_cannot_serve_are_told() -> None:
    text = BASE.replace("node: {gpus: [0, 1, 2, 3]}", "node: {gpus: [0, 1, 5]}").replace("gpus: 1", "gpus: 3")
    found = check_against_node(
        read(text, {"job.yaml": JOB.replace("gpus: 1", "gpus: [GPU-abcd, 0]")}), [0, 1], ["GPU-abcd", "GPU-b"]
    )
    assert sorted(p.message for p in found) == [
        'endpoint "coding" wants 3 GPUs, the node has 2',
        "node.gpus names GPU 5, which this box does not have",
        'overlay "job" is pinned twice to one GPU: GPU-abcd is 0',
    ]
    assert check_against_node(read(BASE), range(4), "abcd") == ()


def test_env_files_hold_variables_quotes_and_comments() -> None:
    content = b"\xef\xbb\xbf# c\n\nexport A=1\r\nB = 'x y' \nC=\"=\"\nD=\nE=#no comment\n"
    assert parse_env_file(content) == {"A": "1", "B": "x y", "C": "=", "D": "", "E": "#no comment"}


@pytest.mark.parametrize(
    "content", [b"A=1\nhunter2\n", b"A=1\nhun ter2=x\n", b"A=1\nCUDA_VISIBLE_DEVICES=0", b"A=1\nB=hunter2\0"]
)
def test_a_wrong_env_file_is_told_by_line_and_never_by_value(content: bytes) -> None:
    with pytest.raises(ValueError, match="line 2") as caught:
        parse_env_file(content)
    assert "ter2" not in str(caught.value)


FIELDS = {
    "priority": st.integers(-9, 9),
    "memory": st.sampled_from(["20GiB", 0.5]),
    "args": st.lists(st.text("ab-", max_size=3), max_size=3),
    "env": st.dictionaries(st.sampled_from("ABC"), st.text("xy", max_size=2)),
    "capabilities": st.lists(st.sampled_from(["chat", "code"]), unique=True),
    "stop": st.fixed_dictionaries({}, optional={"grace": st.sampled_from(["1s", "60s", "1m"]), "drain": st.just("3s")}),
    "state": st.sampled_from(["running", "standby", "stopped"]),
}


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.fixed_dictionaries({}, optional=FIELDS), max_size=4),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_any_order_and_style_of_the_same_data_is_the_same_spec(
    endpoints: dict[str, dict[str, object]], random: Random, flow: bool
) -> None:
    def shuffled(value: object) -> object:
        if not isinstance(value, dict):
            return value
        items = list(value.items())
        random.shuffle(items)
        return {key: shuffled(item) for key, item in items}

    data = {
        "version": 1,
        "endpoints": {n: {"model": "m", "port": 8000 + i, **e} for i, (n, e) in enumerate(sorted(endpoints.items()))},
    }
    one = read(yaml.safe_dump(data))
    two = read("# a comment\n" + yaml.safe_dump(shuffled(data), sort_keys=False, default_flow_style=flow))
    assert one.digest == two.digest
    assert list(one.endpoints) == list(two.endpoints)
    assert [e.process_hash for e in one.endpoints.values()] == [e.process_hash for e in two.endpoints.values()]

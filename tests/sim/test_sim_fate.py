"""The fault script of a node: which starts it strikes, and what an engine does when it is struck."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace
from simulated_box import GIB, Box, Engine, box_of, small_node, until

from reconciler import identity
from reconciler.errors import SpecError
from reconciler.sim.description import parse_node
from reconciler.sim.engine.box import Node
from reconciler.sim.engine.fate import KINDS, LASTING, TIMED, Fate
from reconciler.sim.node import EngineFault, load, prepare

DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture
def boxed(tmp_path: Path):
    """A box with a script, made on demand."""
    made = []

    def make(*faults: EngineFault) -> Box:
        context = box_of(tmp_path, replace(small_node(1), faults=faults))
        made.append(context)
        return context.__enter__()

    yield make
    for context in made:
        context.__exit__(None, None, None)


def fates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *faults: EngineFault, seed: str = "a", starts: int = 40, **env: str
) -> list[list[str]]:
    """The kinds that meet each of so many starts in a row."""
    prepare(folder, replace(small_node(1), faults=faults, seed=seed))
    monkeypatch.setenv("RECONCILER_SIM_DIR", str(folder))
    monkeypatch.delenv("RECONCILER_SUBJECT", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return [sorted(Fate(Node(), {"model": "tiny", "port": "8000"}).rules) for _ in range(starts)]


# ---------------------------------------------------------------- which starts


def test_the_third_start_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = fates(tmp_path, monkeypatch, EngineFault("crash", starts=(3,)), starts=5)
    assert told == [[], [], ["crash"], [], []]


def test_chance_is_the_seeds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = EngineFault("hang", chance=0.3)
    one, again, other = (
        fates(tmp_path / name, monkeypatch, rule, seed=seed, starts=400)
        for name, seed in (("one", "a"), ("again", "a"), ("other", "b"))
    )
    assert one == again
    assert one != other
    assert 0.2 < sum(map(bool, one)) / 400 < 0.4


def test_chance_0_never_and_1_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = fates(tmp_path, monkeypatch, EngineFault("hang", chance=0.0), EngineFault("dies", chance=1.0))
    assert told == [["dies"]] * 40


def test_a_rule_for_another_endpoint_or_model_does_not_strike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        EngineFault("hang", endpoint="ask"),
        EngineFault("dies", model="other"),
        EngineFault("crash", model="tiny"),
    )
    assert fates(tmp_path / "1", monkeypatch, *rules, starts=1) == [["crash"]]
    assert fates(tmp_path / "2", monkeypatch, *rules, starts=1, RECONCILER_SUBJECT="ask") == [["crash", "hang"]]


def test_each_endpoint_has_a_count_of_its_own_that_outlives_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = EngineFault("crash", starts=(2,))
    assert fates(tmp_path, monkeypatch, rule, starts=1, RECONCILER_SUBJECT="a/b") == [[]]
    assert fates(tmp_path, monkeypatch, rule, starts=1, RECONCILER_SUBJECT="ask") == [[]]
    assert fates(tmp_path, monkeypatch, rule, starts=2, RECONCILER_SUBJECT="a/b") == [["crash"], []]


def test_another_node_in_the_folder_begins_to_count_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = EngineFault("crash", starts=(2,))
    assert fates(tmp_path, monkeypatch, rule, starts=2) == [[], ["crash"]]
    assert fates(tmp_path, monkeypatch, rule, seed="b", starts=2) == [[], ["crash"]]


def test_without_a_script_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fates(tmp_path, monkeypatch, starts=2) == [[], []]
    assert list((tmp_path / "starts").iterdir()) == []


# ---------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("out_of_memory", "on startup is less than desired GPU memory utilization"),
        ("memory_changed", "AssertionError: Error in memory profiling."),
        ("crash", "Engine core initialization failed"),
    ],
)
def test_a_start_that_is_struck_ends_with_1_and_the_next_one_comes_up(boxed, kind: str, said: str) -> None:
    box = boxed(EngineFault(kind, starts=(1,)))
    struck = box.serve()
    assert struck.exit_code() == 1
    assert said in struck.said()
    assert f"simulated fault: {kind}" in struck.said()
    until(lambda: not box.used(0))
    assert box.serve(port=struck.port).ready().answers()


def test_a_start_can_take_longer_or_for_ever(boxed) -> None:
    box = boxed(EngineFault("slow_start", starts=(1,), for_s=100.0), EngineFault("stuck_start", starts=(2,)))
    began = time.monotonic()
    slow = box.serve().ready()
    assert time.monotonic() - began > 1.0, "100 s a hundred times faster, besides the load itself"
    os.killpg(slow.pid, signal.SIGKILL)
    until(lambda: not box.used(0))
    stuck = box.serve(port=slow.port)
    until(lambda: "simulated fault: stuck_start" in stuck.said())
    time.sleep(0.5)
    assert stuck.process.poll() is None
    assert not stuck.answers()


def test_an_engine_dies_after_its_time(boxed) -> None:
    began = time.monotonic()
    engine = boxed(EngineFault("dies", after_s=150.0)).serve(**DEVELOPER).ready()
    assert engine.exit_code() == 0
    assert time.monotonic() - began > 1.8, "0.3 s of load and 1.5 s of life, a hundred times faster"
    assert "illegal memory access" in engine.said()


def test_an_engine_hangs_with_its_third_request_while_all_pages_stay_green(boxed) -> None:
    engine = boxed(EngineFault("hang", requests=3)).serve(CUDA_VISIBLE_DEVICES="0").ready()
    for _ in range(2):
        assert engine.post("/v1/completions", max_tokens=2).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"http://127.0.0.1:{engine.port}/v1/completions", json={"max_tokens": 2}, trust_env=False, timeout=0.5
        )
    assert engine.get("/health").status_code == 200
    core = engine.tree()["VLLM::EngineCore"]
    os.kill(core, signal.SIGTERM)
    time.sleep(0.2)
    stat = identity.read_stat(core)
    assert stat is not None
    assert not stat.gone, "it is in a call of the driver: SIGTERM does not reach it"


def test_a_frozen_server_takes_connections_and_answers_nothing(boxed) -> None:
    engine = boxed(EngineFault("freeze", after_s=30.0)).serve(CUDA_VISIBLE_DEVICES="0").ready()

    def silent() -> bool:
        with suppress(httpx.ReadTimeout):
            httpx.get(f"http://127.0.0.1:{engine.port}/health", trust_env=False, timeout=0.5)
            return False
        return True

    until(silent)
    engine.process.terminate()
    time.sleep(0.3)
    assert engine.process.poll() is None


def test_a_slow_probe_is_slow_and_true(boxed) -> None:
    engine = boxed(EngineFault("slow_probe", requests=1, for_s=150.0)).serve().ready()
    assert engine.get("/health").elapsed.total_seconds() < 1.5
    engine.post("/v1/completions", max_tokens=1)
    answer = engine.get("/health")
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() > 1.5


def test_a_sleep_that_fails_leaves_everything_as_it_was(boxed) -> None:
    box = boxed(EngineFault("sleep_fails"))
    engine = box.serve("--enable-sleep-mode", **DEVELOPER).ready()
    before = box.used(0)
    assert engine.post("/sleep?level=1").status_code == 500
    assert engine.get("/is_sleeping").json() == {"is_sleeping": False}
    assert box.used(0) == before
    assert engine.post("/v1/completions", max_tokens=1).status_code == 200


def test_a_wake_that_runs_out_of_memory_ends_the_server_with_0(boxed) -> None:
    engine = boxed(EngineFault("wake_out_of_memory")).serve("--enable-sleep-mode", **DEVELOPER).ready()
    assert engine.post("/sleep?level=1").status_code == 200
    assert engine.post("/wake_up").status_code == 500
    assert engine.exit_code() == 0
    assert "torch.OutOfMemoryError" in engine.said()


def test_one_that_ignores_sigterm_goes_on_answering(boxed) -> None:
    engine: Engine = boxed(EngineFault("ignores_sigterm")).serve().ready()
    engine.process.terminate()
    until(lambda: "simulated fault: ignores_sigterm" in engine.said())
    time.sleep(0.2)
    assert engine.answers()


# ---------------------------------------------------------------- how it is written


def node_of(folder: Path, faults: str):
    path = folder / "node.yaml"
    path.write_text("gpus: [{name: H100}]\nfaults:\n" + faults, "utf-8")
    return parse_node(str(path))


def test_a_script_is_read_and_comes_back_from_the_folder(tmp_path: Path) -> None:
    node = node_of(
        tmp_path,
        "  - {fault: out_of_memory, endpoint: coding, start: 3}\n"
        "  - {fault: hang, model: org/m, requests: 5, start: [1, 2]}\n"
        "  - {fault: dies, after: 40s, chance: 0.2}\n"
        "  - {fault: slow_probe, for: 8s}\n",
    )
    assert node.faults == (
        EngineFault("out_of_memory", endpoint="coding", starts=(3,)),
        EngineFault("hang", model="org/m", requests=5, starts=(1, 2)),
        EngineFault("dies", after_s=40.0, chance=0.2),
        EngineFault("slow_probe", for_s=8.0),
    )
    prepare(tmp_path / "sim", node)
    assert load(tmp_path / "sim") == node


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("{fault: hangs}", "no fault is called 'hangs'; did you mean 'hang'?"),
        ("{endpoint: a}", "which fault?"),
        ("{fault: hang, chance: 1.5}", "'1.5' is not a number from 0 to 1"),
        ("{fault: hang, start: 0}", "'0' is not a whole number above 0"),
        ("{fault: hang, for: 3s}", "hang has no length"),
        ("{fault: slow_probe}", "slow_probe lasts some time"),
        ("{fault: crash, after: 3s}", "crash has a time of its own"),
        ("{fault: hang, afer: 3s}", "unknown key 'afer'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_an_error_with_its_place(tmp_path: Path, rule: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        node_of(tmp_path, f"  - {rule}\n")
    assert said in str(caught.value)
    assert "node.yaml:3:" in str(caught.value)


def test_every_fault_is_in_the_manual() -> None:
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text("utf-8")
    assert [kind for kind in KINDS if f"| `{kind}` |" not in text] == []
    assert KINDS.keys() >= LASTING | TIMED


def test_faults_of_a_busy_node_cannot_change(boxed) -> None:
    box = boxed(EngineFault("hang"))
    box.tenant(0, GIB)
    with pytest.raises(Exception, match="cannot change while processes hold its memory"):
        prepare(box.sim_dir, replace(box.node, faults=()))

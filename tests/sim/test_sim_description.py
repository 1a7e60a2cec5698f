"""What `--simulate` may be given, and what is said of the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reconciler.errors import SpecError, UsageError
from reconciler.sim.description import parse_node
from reconciler.sim.node import ModelFigures, SimGpu

GIB = 1 << 30


def test_a_count_and_a_size_make_equal_gpus_at_a_fiftieth_of_real_time() -> None:
    node = parse_node("4x80GiB")
    assert node.gpus == (SimGpu("Simulated 80GiB GPU", 80 * GIB),) * 4
    assert node.time_scale == 0.02
    assert node.release_delay_s == 0.3


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("8xH100", "NVIDIA H100 80GB HBM3", 80),
        ("2xh200", "NVIDIA H200", 141),
        ("6x4090", "NVIDIA GeForce RTX 4090", 24),
        ("6xRTX4090", "NVIDIA GeForce RTX 4090", 24),
        ("1xRTX 4090", "NVIDIA GeForce RTX 4090", 24),
        ("1xL4", "NVIDIA L4", 24),
        ("1xT4", "Tesla T4", 16),
        ("1xL40S", "NVIDIA L40S", 48),
        ("1xB200", "NVIDIA B200", 180),
    ],
)
def test_well_known_gpus_bring_their_memory(text: str, name: str, gib: int) -> None:
    gpu = parse_node(text).gpus[0]
    assert (gpu.name, gpu.memory_bytes) == (name, gib * GIB)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nonsense", "8xH100"),
        ("0xH100", "8xH100"),
        ("9999xH100", "8xH100"),
        ("4xH10O", "did you mean H100?"),
        ("4x80", "known GPUs"),
        ("4x80MiB", "8xH100"),
        ("missing.yaml", "8xH100"),
    ],
)
def test_a_wrong_short_form_is_wrong_usage_with_a_way_out(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_node(text)
    assert hint in (caught.value.hint or "")


def test_a_file_describes_every_gpu_and_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(
        """
gpus:
  - {name: RTX4090, count: 2, numa: 0}
  - {name: Odd Card, memory: 20GiB, reserved: 300MiB, numa: 1, nvlink: 2}
time_scale: 0.5
release_delay: 1s
driver_version: "550.1"
seed: other
models:
  Qwen/Qwen3-1.7B: {load: 45s, weights: 3GiB}
"""
    )
    node = parse_node(str(path))
    assert [gpu.name for gpu in node.gpus] == ["NVIDIA GeForce RTX 4090"] * 2 + ["Odd Card"]
    assert node.gpus[2] == SimGpu("Odd Card", 20 * GIB, 300 << 20, 1, 2)
    assert (node.time_scale, node.release_delay_s, node.driver_version) == (0.5, 1.0, "550.1")
    assert node.models == {"Qwen/Qwen3-1.7B": ModelFigures(45.0, 3 * GIB)}


def test_a_file_without_a_time_scale_runs_in_real_time(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text("gpus: [{name: T4}]")
    assert parse_node(str(path)).time_scale == 1.0


def test_every_problem_of_a_file_is_listed_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(
        "gpus:\n  - {name: H10O}\n  - {name: T4, memroy: 2GiB}\ntime_scale: fast\nrelease_delay: 300\nmodels: [a]\n"
    )
    with pytest.raises(SpecError) as caught:
        parse_node(str(path))
    problems = caught.value.problems
    assert [problem.line for problem in problems] == [2, 3, 4, 5, 6]
    assert "did you mean H100?" in (problems[0].hint or "")
    assert problems[1].hint == "did you mean 'memory'?"
    assert "ms, s, m" in problems[3].message


@pytest.mark.parametrize("text", ["", "gpus: []", "gpus: {a: b}", "gpus: [", "- 1", "gpus: [{name: T4, count: 0}]"])
def test_a_file_without_gpus_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(text)
    with pytest.raises(SpecError):
        parse_node(str(path))


def test_uuids_have_the_form_of_nvidias_and_are_the_same_in_every_run() -> None:
    node = parse_node("2xT4")
    assert re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", node.uuid(0))
    assert node.uuid(0) == parse_node("8xH100").uuid(0) != node.uuid(1)

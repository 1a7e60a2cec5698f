"""Any program on the simulated node, nvitop first of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from simulated_box import GIB, Box

from reconciler.errors import StateError, UsageError
from reconciler.sim.exec import environment, run


def output(box: Box, *command: str, **env: str) -> str:
    done = subprocess.run(
        command,
        env=environment(box.sim_dir, {**os.environ, **env}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nvitop_believes_the_simulated_node(box: Box) -> None:
    tenant = box.tenant(1, 6 * GIB)
    code = (
        "import json; from nvitop import Device;"
        "print(json.dumps([[d.name(), d.uuid(), d.memory_total(), d.memory_used(), sorted(d.processes())]"
        " for d in Device.all()]))"
    )
    assert json.loads(output(box, "python", "-c", code)) == [
        ["NVIDIA GeForce RTX 4090", box.node.uuid(0), 24 * GIB, 0, []],
        ["NVIDIA GeForce RTX 4090", box.node.uuid(1), 24 * GIB, 6 * GIB, [tenant.pid]],
    ]


def test_nvitops_own_page_shows_the_process_that_holds_memory(box: Box) -> None:
    tenant = box.tenant(0, 6 * GIB)
    page = output(box, "python", "-m", "nvitop", "--once", "--ascii")
    assert "GeForce RTX 4090" in page
    assert str(tenant.pid) in page
    assert "6144MiB" in page


def test_a_program_that_never_asks_for_pynvml_does_not_load_it(box: Box) -> None:
    code = "import sys; print([m for m in sys.modules if m == 'pynvml' or m.startswith('reconciler')])"
    assert output(box, "python", "-c", code).strip() == "[]"


def test_a_sitecustomize_that_was_there_before_still_runs(box: Box, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "sitecustomize.py").write_text("import builtins; builtins.was_here = True")
    code = "import pynvml; pynvml.nvmlInit(); print(was_here, pynvml.nvmlDeviceGetCount())"
    assert output(box, "python", "-c", code, PYTHONPATH=str(tmp_path / "before")).strip() == "True 2"


def test_an_interpreter_without_pynvml_or_without_this_project_works_as_ever(box: Box, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pynvml.py").write_text("own = True")
    venv.create(tmp_path / "bare", symlinks=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    code = "try:\n import pynvml\nexcept ModuleNotFoundError as e:\n print(e)"
    assert output(box, bare, "-c", code).strip() == "No module named 'pynvml'"
    code = "import pynvml; print(pynvml.own)"
    assert output(box, bare, "-c", code, PYTHONPATH=str(elsewhere)).strip() == "True"


def test_the_simulated_engine_and_this_interpreter_come_first_on_the_path(box: Box) -> None:
    env = environment(box.sim_dir, {"PATH": "/usr/bin"})
    assert env["PATH"].split(os.pathsep) == [str(box.sim_dir / "bin"), str(Path(sys.executable).parent), "/usr/bin"]
    assert env["RECONCILER_SIM_DIR"] == str(box.sim_dir)
    assert output(box, "vllm", "--version").strip() == "0.33.0"


def test_the_exit_code_of_the_program_is_handed_on(box: Box, tmp_path: Path) -> None:
    assert run(box.sim_dir, ["python", "-c", "raise SystemExit(7)"]) == 7
    assert run(box.sim_dir, ["sh", "-c", "kill -9 $$"]) == -9
    with pytest.raises(UsageError, match="no such program"):
        run(box.sim_dir, ["no-such-program-anywhere"])
    with pytest.raises(UsageError, match="nothing to run"):
        run(box.sim_dir, [])
    with pytest.raises(StateError):
        run(tmp_path / "nowhere", ["true"])

"""How many of the branches of the code the tests run, in subprocesses, shims and leaders too.

    pip install coverage
    python benchmarks/branches.py run -n 0 tests/journal tests/loop   # any arguments of pytest; in pieces, if wanted
    python benchmarks/branches.py report act loop journal             # these rooms, by all pieces together

Every Python process that the tests start is measured, since it finds a `sitecustomize` on PYTHONPATH. The fork server
of the shims runs with `-I -S` and without an environment, so it would not: here another script stands in its place,
which starts the measurement and then runs the real one. The package knows nothing of that. All of it lies in
.coverage.d; remove that to begin anew, as is needed once the code was edited.

What a process killed with SIGKILL had run is lost, so a figure may be too low and is never too high.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / ".coverage.d"
CONFIG = FOLDER / "coveragerc"

SETTINGS = f"""\
[run]
branch = true
source = {REPO / "reconciler"}
data_file = {FOLDER / "data" / "of"}
parallel = true
sigterm = true
patch = _exit
disable_warnings = no-data-collected, module-not-measured, already-imported

[report]
show_missing = true
exclude_also =
    if TYPE_CHECKING:
    assert_never
"""

SITE_CUSTOMIZE = """\
import importlib.machinery
import sys

import coverage

coverage.process_startup()


class MeasuredForkServer(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "reconciler.act.forkserver":
            return None
        spec = super().find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_redirect(module):
            execute(module)
            module._SHIM = '{stand_in}'

        spec.loader.exec_module = execute_and_redirect
        return spec


sys.meta_path.insert(0, MeasuredForkServer)
"""

STAND_IN = """\
import os
import runpy
import sys

sys.path.append({packages!r})
os.environ["COVERAGE_PROCESS_START"] = {config!r}
import coverage

measured = coverage.process_startup()
execute = os.execve


def save_and_execute(*arguments):
    try:
        measured.save()  # a program that is executed ends this one without a word
    except Exception:
        pass
    execute(*arguments)


os.execve = save_and_execute
runpy.run_path({shim!r}, run_name="__main__")
"""


def prepare() -> None:
    data = FOLDER / "data"
    data.mkdir(parents=True, exist_ok=True)
    data.chmod(0o777)
    found = importlib.util.find_spec("coverage")
    if found is None or found.origin is None:
        sys.exit("coverage is not installed: pip install coverage")
    stand_in = FOLDER / "stand_in.py"
    packages = str(Path(found.origin).parent.parent)
    shim = str(REPO / "reconciler" / "act" / "shim.py")
    CONFIG.write_text(SETTINGS)
    (FOLDER / "sitecustomize.py").write_text(SITE_CUSTOMIZE.format(stand_in=stand_in))
    stand_in.write_text(STAND_IN.format(packages=packages, config=str(CONFIG), shim=shim))


def run(arguments: list[str]) -> int:
    prepare()
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "COVERAGE_PROCESS_START": str(CONFIG)}
    return subprocess.run(
        (sys.executable, "-m", "pytest", *arguments), cwd=REPO, env=environment, check=False
    ).returncode


def report(rooms: list[str]) -> None:
    from coverage import Coverage

    measured = Coverage(config_file=str(CONFIG))
    measured.combine(keep=True)
    include = [f"{REPO}/reconciler/{room}/*" for room in rooms] or None
    measured.report(include=include)
    print("\nbranches alone:")
    totals: dict[str, list[int]] = {}
    for file in sorted(measured.get_data().measured_files()):
        room = Path(file).relative_to(REPO / "reconciler").parts[0]
        if rooms and room not in rooms:
            continue
        branches = measured._analyze(file).numbers  # noqa: SLF001 - the public reports round both together
        total = totals.setdefault(room, [0, 0])
        total[0] += branches.n_executed_branches
        total[1] += branches.n_branches
    for room, (executed, known) in totals.items():
        print(f"{room:12} {executed} of {known}: {100 * executed / known if known else 100:.1f} %")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *arguments]:
            sys.exit(run(arguments))
        case ["report", *rooms]:
            report(rooms)
        case _:
            sys.exit(__doc__)

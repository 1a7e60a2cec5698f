"""What `doctor` finds: each check is shown both ways, on a thing that is well and on one that is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from reconciler.cgroup import Home
from reconciler.checkup.check import Check
from reconciler.checkup.gpus import check_gpus
from reconciler.checkup.service import check_service, runs_the_daemon
from reconciler.checkup.state import check_state, file_system
from reconciler.checkup.subjects import check_leftovers, check_ports, check_programs
from reconciler.checkup.system import check_groups, check_kernel, check_versions, parse_release
from reconciler.clock import Instant, SystemClock
from reconciler.journal.journal import Journal
from reconciler.journal.layout import StateDir
from reconciler.plan.ledger import Ledger, Quarantine
from reconciler.plan.observed import Gpu, GpuProcess, Incarnation, Observed, PortHolder, Subject
from reconciler.spec.load import SourceText, resolve_texts
from reconciler.spec.spec import Spec

NOW = Instant(1000.0, 10.0)
GIB = 1 << 30
GOOD_UNIT = Path(__file__).resolve().parents[2] / "examples/systemd/reconciler.service"
SETPOINTS = """\
version: 1
endpoints:
  one: {engine: custom, command: [sh, -c, "true"], port: 18700, gpus: 1}
"""


def wrong(checks: tuple[Check, ...]) -> list[str]:
    return [check.message for check in checks if check.level != "ok"]


def spec_of(text: str = SETPOINTS, folder: Path = Path("/")) -> Spec:
    return resolve_texts(SourceText(str(folder / "setpoints.yaml"), text), ())


def gpu(**fields: object) -> Gpu:
    base = Gpu(0, "GPU-a", "Card", "ok", 80 * GIB, 0, (), "", healthy=True, at=NOW)
    return replace(base, **fields)  # type: ignore[arg-type]


def observed(*gpus: Gpu, **fields: object) -> Observed:
    return replace(Observed(NOW, "boot", gpus, ()), **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the ground


def test_the_packages_that_are_there_are_named_with_their_versions() -> None:
    checks = check_versions()
    assert not wrong(checks)
    assert "pydantic 2." in checks[-1].message


@pytest.mark.parametrize(
    ("home", "message"),
    [
        (Home("/sys/fs/cgroup/x"), "each start gets a control group of its own, in /sys/fs/cgroup/x"),
        (Home(None, "it is not writable"), "no control groups can be had (it is not writable): trees are followed by"),
    ],
)
def test_it_says_whether_control_groups_can_be_had(home: Home, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.checkup.system.find_home", {7: home}.__getitem__)
    assert check_groups(7).message.startswith(message)


def test_a_box_that_runs_this_test_has_what_is_asked_of_the_kernel() -> None:
    assert not [check for check in check_kernel(gangs=False) if check.level == "error"]


@pytest.mark.parametrize(("release", "found"), [("6.18.44-x", (6, 18)), ("5.4.0", (5, 4)), ("weird", None)])
def test_a_release_is_read(release: str, found: tuple[int, int] | None) -> None:
    assert parse_release(release) == found


# ---------------------------------------------------------------- the driver's GPUs


def test_a_gpu_that_is_well_is_said_to_be() -> None:
    checks = check_gpus(observed(gpu()), Ledger())
    assert [(check.level, check.area) for check in checks] == [("ok", "GPUs")]


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (gpu(state="lost", detail="the driver no longer lists it"), "is lost: the driver no longer lists it"),
        (gpu(healthy=False, detail="rows wait to be remapped"), "rows wait to be remapped"),
        (gpu(used_bytes=9 * GIB, processes=()), "9216 MiB are in use, and no process is named for them"),
        (
            gpu(used_bytes=9 * GIB, processes=(GpuProcess(7, 8 * GIB, None, "ann", "python train.py"),)),
            "pid 7 of ann holds 8192 MiB: python train.py",
        ),
    ],
)
def test_a_gpu_that_is_not_well_is_told_with_what_to_do(seen: Gpu, words: str) -> None:
    (check,) = check_gpus(observed(seen), Ledger())
    assert check.level != "ok"
    assert words in check.message
    assert check.hint


@pytest.mark.parametrize(
    ("command", "engine"),
    [
        ("VLLM::EngineCore", "vllm"),
        ("VLLM::Worker_TP1", "vllm"),
        ("/opt/venv/bin/python /opt/venv/bin/vllm serve o/m --port 80", "vllm"),
        ("sglang::scheduler_TP0", "sglang"),
        ("/usr/bin/llama-server -m m.gguf", "llamacpp"),
        ("/opt/conda/bin/python /opt/conda/bin/text-generation-server serve o/m", "tgi"),
        ("text-embeddings-router --model-id o/m", "tei"),
        ("python train.py --teacher vllm", None),
        ("vim llama-servers.md", None),
        (None, None),
    ],
)
def test_what_an_engine_left_behind_is_known_by_its_title(command: str | None, engine: str | None) -> None:
    """SIGKILL of a vLLM server leaves its engine core with the memory: no record of ours names it."""
    seen = gpu(used_bytes=9 * GIB, processes=(GpuProcess(7, 8 * GIB, None, "ann", command),))
    (check,) = check_gpus(observed(seen), Ledger())
    assert (check.level, "never signalled" in (check.hint or "")) == ("warning", True)
    told = (check.hint or "").partition(" engine that is not this program's")
    assert (told[0].rpartition(" ")[2] if told[1] else None) == engine


def test_a_quarantined_gpu_is_told_with_the_command_that_clears_it() -> None:
    ledger = Ledger(quarantines={"GPU-a": Quarantine("GPU-a", NOW, "MemoryNotFreed")})
    (check,) = check_gpus(observed(gpu()), ledger)
    assert "quarantined: MemoryNotFreed" in check.message
    assert "reconciler reset 0" in (check.hint or "")


def test_a_process_of_ours_on_a_gpu_is_no_stranger() -> None:
    mine = GpuProcess(7, 8 * GIB, Subject("endpoint", "one"), "me", "vllm")
    assert not wrong(check_gpus(observed(gpu(used_bytes=9 * GIB, processes=(mine,))), Ledger()))


def test_a_driver_that_does_not_answer_is_unknown_and_not_an_empty_box() -> None:
    (check,) = check_gpus(observed(gpus_known=False, gpus_detail="NVML does not answer"), Ledger())
    assert (check.level, check.message) == ("unknown", "NVML does not answer")


# ---------------------------------------------------------------- programs, ports, leftovers


def test_programs_that_are_there_are_found_along_the_path_that_they_would_get(tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = SETPOINTS.replace('[sh, -c, "true"]', "[engine]")
    here, elsewhere = {"PATH": str(tmp_path)}, {"PATH": "/nowhere"}
    missing = ["one: engine is not on PATH"]
    root = ["a daemon of root's would run 1 of them as root too"] * (os.geteuid() == 0)
    assert wrong(check_programs(spec_of(text), here)) == root
    assert wrong(check_programs(spec_of(text), elsewhere)) == missing + root
    # its own PATH counts, not the daemon's
    own = text.replace("gpus: 1", f"gpus: 1, env: {{PATH: {tmp_path}}}")
    assert wrong(check_programs(spec_of(own), elsewhere)) == root


def test_a_program_that_several_need_is_told_once_and_a_stopped_one_is_not_asked_for() -> None:
    endpoints = "".join(
        f"  {name}: {{engine: custom, command: [no-such-engine], port: {port}, gpus: 0, state: {state}}}\n"
        for name, port, state in (("one", 18700, "running"), ("two", 18701, "standby"), ("off", 18702, "stopped"))
    )
    messages = wrong(check_programs(spec_of(f"version: 1\nendpoints:\n{endpoints}"), {"PATH": "/bin"}))
    assert messages[0] == "one, two: no-such-engine is not on PATH"


def test_a_folder_and_an_env_file_that_are_gone_are_told(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.env"
    secrets.write_text("TOKEN=1\n")
    secrets.chmod(0o600)
    text = SETPOINTS.replace("gpus: 1", f"gpus: 1, env_file: {secrets}, cwd: {tmp_path}/work")
    (tmp_path / "work").mkdir()
    spec = spec_of(text, tmp_path)
    secrets.unlink()
    (tmp_path / "work").rmdir()
    messages = wrong(check_programs(spec, {"PATH": "/bin:/usr/bin"}))
    assert f"one: {secrets}: env_file cannot be read: No such file or directory" in messages
    assert f"one: the folder {tmp_path}/work is not there" in messages


def test_an_env_file_that_others_may_read_is_told(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.env"
    secrets.write_text("TOKEN=1\n")
    spec = spec_of(SETPOINTS.replace("gpus: 1", f"gpus: 1, env_file: {secrets}"), tmp_path)
    for mode, told in ((0o600, False), (0o640, True), (0o604, True)):
        secrets.chmod(mode)
        messages = wrong(check_programs(spec, {"PATH": "/bin:/usr/bin"}))
        assert (f"{secrets} is for secrets, and others may read it" in messages) is told


def test_a_port_that_a_stranger_listens_on_is_told_with_who_wants_it() -> None:
    spec = spec_of()
    assert not wrong(check_ports(spec, observed()))
    taken = observed(ports={18700: PortHolder(18700, 42, "nginx")})
    assert wrong(check_ports(spec, taken)) == ["port 18700 of one is taken by pid 42: nginx"]


def test_what_lives_on_after_its_leader_and_what_cannot_be_told_is_told() -> None:
    base = Incarnation("i1", Subject("endpoint", "one"), "h", (), (), False, 18700, NOW, "running", 5, (), None, None)
    spec = spec_of()
    assert not wrong(check_leftovers(spec, observed(incarnations=(base,)), ()))
    orphans = replace(base, phase="vanished", strays=(8, 9))
    unknown = replace(base, phase="unknown")
    removed = replace(base, subject=Subject("endpoint", "gone"))
    told = wrong(check_leftovers(spec, observed(incarnations=(orphans, unknown, removed)), ()))
    assert told == [
        "one has ended, 2 of its processes live on (8, 9)",
        "what became of one cannot be told",
        "gone runs and is in no file any more",
    ]


# ---------------------------------------------------------------- the state directory


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """A state directory as a daemon leaves it."""
    state = StateDir(tmp_path / "state")
    state.ensure()
    Journal.open(state.journal, SystemClock()).close()
    return state


def test_a_state_directory_as_a_daemon_leaves_it_is_sound(state: StateDir) -> None:
    checks = check_state(state)
    assert not [check for check in checks if check.level == "error"]
    assert not [m for m in wrong(checks) if "others" in m]


def test_one_that_is_not_there_yet_is_no_fault(tmp_path: Path) -> None:
    assert not wrong(check_state(StateDir(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_files_that_others_may_read_and_links_are_told(state: StateDir) -> None:
    state.journal.chmod(0o644)
    (state.logs / "link").symlink_to("/etc/passwd")
    messages = wrong(check_state(state))
    assert f"others may look into {state.journal}" in messages
    assert f"links or files of others: {state.logs / 'link'}" in messages


def test_a_folder_above_that_others_may_write_is_told(state: StateDir) -> None:
    above, further = state.path.parent, state.path.parent.parent
    above.chmod(0o777)
    assert [c.level for c in check_state(state) if str(above) in c.message and "can be written" in c.message] == [
        "error"
    ]
    above.chmod(0o1777)
    assert not [c for c in check_state(state) if "can be written" in c.message]
    above.chmod(0o700)
    before = further.stat().st_mode
    further.chmod(0o777)
    try:
        assert [c.level for c in check_state(state) if f"{further}, above" in c.message] == ["warning"]
    finally:
        further.chmod(before)


def test_a_damaged_journal_is_told(state: StateDir) -> None:
    content = bytearray(state.journal.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    state.journal.write_bytes(content)
    assert [check for check in check_state(state) if check.level == "error" and str(state.journal) in check.message]


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    table = "\n".join(
        [
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw",
            "30 22 0:40 / /home rw shared:1 - nfs4 server:/home rw",
            "31 30 8:2 / /home/local rw - xfs /dev/sdb rw",
        ]
    )
    assert file_system(Path("/var/x"), table) == "ext4"
    assert file_system(Path("/home/ann/state"), table) == "nfs4"
    assert file_system(Path("/home/local/state"), table) == "xfs"
    assert file_system(Path("/homestead"), table) == "ext4"


# ---------------------------------------------------------------- the unit


def unit_checks(folder: Path) -> tuple[Check, ...]:
    return check_service({"SYSTEMD_UNIT_PATH": str(folder)}, folder)


def test_the_unit_that_is_shipped_has_nothing_wrong(tmp_path: Path) -> None:
    (tmp_path / "reconciler.service").write_text(GOOD_UNIT.read_text())
    (check,) = unit_checks(tmp_path)
    assert (check.level, check.message) == (
        "ok",
        f"{tmp_path}/reconciler.service: stopping it leaves endpoints running",
    )


@pytest.mark.parametrize(
    ("line", "instead", "level", "words"),
    [
        ("KillMode=process", "KillMode=mixed", "error", "KillMode=mixed would end every endpoint"),
        ("KillMode=process", "", "error", "KillMode=control-group would end every endpoint"),
        ("OOMPolicy=continue", "", "warning", "OOM killer"),
        ("Type=notify", "Type=simple", "warning", "before the daemon has looked"),
        ("WatchdogSec=1min", "WatchdogSec=0", "warning", "hangs is not noticed"),
        ("ExecReload=/bin/kill -HUP $MAINPID", "ExecReload=", "warning", "cannot be reloaded"),
        ("Restart=always", "Restart=no", "warning", "not started again"),
        ("KillMode=process", "KillMode=process\nPrivateTmp=yes", "warning", "takes /tmp"),
        ("KillMode=process", "KillMode=none", "error", "KillMode=none would not end the daemon itself"),
        ("KillMode=process", "KillMode=process\nPrivatePIDs=yes", "error", "ends every process"),
        ("KillMode=process", "KillMode=process\nDynamicUser=true", "error", "gives the user to somebody else"),
        ("KillMode=process", "KillMode=process\nRemoveIPC=1", "error", "takes the shared memory"),
        ("KillMode=process", "KillMode=process\nPrivateNetwork=on", "error", "where nobody reaches them"),
        ("KillMode=process", "KillMode=process\nPrivateDevices=yes", "error", "hides the GPUs"),
        ("KillMode=process", "KillMode=process\nProcSubset=pid", "error", "hides what identity is proved with"),
        ("KillMode=process", "KillMode=process\nProtectProc=invisible", "warning", "ProtectProc=invisible hides whose"),
        ("KillMode=process", "KillMode=process\nDevicePolicy=closed", "error", "keeps endpoints from the GPUs"),
        ("ExecReload=/bin/kill -HUP $MAINPID", "ExecReload=/bin/kill $MAINPID", "error", "would end the daemon"),
        ("RestartSec=2s", "", "warning", "gives up for good after five starts"),
        ("RestartSec=2s", "RestartSec=500ms", "warning", "gives up for good after five starts"),
        ("Delegate=yes", "Delegate=no", "warning", "no start gets a control group"),
        ("Delegate=yes", "Delegate=yes\nProtectControlGroups=yes", "warning", "keeps starts from having"),
        ("Type=notify\n", "Type=notify-reload\n", "warning", "an answer that the daemon does not give"),
    ],
)
def test_each_thing_that_the_unit_lacks_is_told(
    tmp_path: Path, line: str, instead: str, level: str, words: str
) -> None:
    text = GOOD_UNIT.read_text()
    assert line in text
    (tmp_path / "reconciler.service").write_text(text.replace(line, instead))
    (check,) = unit_checks(tmp_path)
    assert check.level == level
    assert words in check.message
    assert (check.hint or "").startswith("[Service] ")


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("RestartSec=2s", "RestartSec=1min 30s"),
        ("[Unit]", "[Unit]\nStartLimitIntervalSec=0"),
        ("ExecReload=/bin/kill -HUP $MAINPID", "ExecReload=/usr/bin/kill -s HUP $MAINPID"),
        ("ExecReload=/bin/kill -HUP $MAINPID", "ExecReload=kill -SIGHUP $MAINPID"),
        ("KillMode=process", "KillMode=process\nDevicePolicy=closed\nDeviceAllow=char-nvidia rw"),
        ("KillMode=process", "KillMode=process\nRemoveIPC=no\nPrivateTmp=no"),
    ],
)
def test_what_is_as_good_is_not_complained_of(tmp_path: Path, line: str, instead: str) -> None:
    text = GOOD_UNIT.read_text()
    assert line in text
    changed = text.replace(line, instead)
    if "StartLimit" in instead:
        changed = changed.replace("RestartSec=2s", "RestartSec=100ms")
    (tmp_path / "reconciler.service").write_text(changed)
    assert [check.level for check in unit_checks(tmp_path)] == ["ok"]


def test_a_secret_in_the_unit_is_told_without_its_value(tmp_path: Path) -> None:
    lines = 'Environment=A=1 "HF_TOKEN=hunter2"\nEnvironment=LANG=C\nEnvironment=VLLM_API_KEY=hunter2'
    (tmp_path / "reconciler.service").write_text(GOOD_UNIT.read_text().replace("KillMode", f"{lines}\nKillMode"))
    checks = unit_checks(tmp_path)
    assert ["HF_TOKEN" in c.message for c in checks] == [True, False]
    assert ["VLLM_API_KEY" in c.message for c in checks] == [False, True]
    assert {c.level for c in checks} == {"warning"}
    assert "hunter2" not in str(checks)


def test_a_drop_in_counts(tmp_path: Path) -> None:
    (tmp_path / "gpu.service").write_text(GOOD_UNIT.read_text())
    (tmp_path / "gpu.service.d").mkdir()
    (tmp_path / "gpu.service.d" / "10-kill.conf").write_text("[Service]\nKillMode=control-group\n")
    (check,) = unit_checks(tmp_path)
    assert check.level == "error"


def test_units_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nginx.service").write_text("[Service]\nExecStart=/usr/sbin/nginx run\n")
    (check,) = unit_checks(tmp_path)
    assert (check.level, check.message) == ("ok", "no systemd unit runs the daemon")


@pytest.mark.parametrize(
    ("command", "is_ours"),
    [
        ("/opt/reconciler/bin/reconciler --state-dir /x run", True),
        ("-/usr/bin/python3 -m reconciler run", True),
        ("/opt/reconciler/bin/reconciler status", False),
        ("/bin/run", False),
        ("sh -c 'unbalanced", False),
    ],
)
def test_a_unit_is_ours_by_its_command(command: str, is_ours: bool) -> None:
    assert runs_the_daemon(command) is is_ours

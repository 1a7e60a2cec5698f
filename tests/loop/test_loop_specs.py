"""Which spec is in force when files are edited, broken, emptied or gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.clock import Instant
from reconciler.errors import SpecError
from reconciler.loop import specs as module
from reconciler.loop.specs import SpecKeeper
from reconciler.plan.ledger import Ledger, OverlayRecord
from reconciler.spec.load import SourceText
from reconciler.spec.spec import Source, Spec

SETPOINTS = """\
version: 1
endpoints:
  one: {engine: custom, command: [serve], gpus: [0], port: 8080}
"""
OVERLAY = """\
version: 1
makespan: {duration: 5m}
gpus: 1
workload: {command: [render]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "overlays").mkdir()
    (tmp_path / "setpoints.yaml").write_text(SETPOINTS)
    (tmp_path / "overlays" / "job.yaml").write_text(OVERLAY)
    return tmp_path / "setpoints.yaml"


def keeper(path: Path, remembered: dict[str, str] | None = None) -> SpecKeeper:
    return SpecKeeper(path, remembered or {}, transform=None)


def live(placement_hash: str) -> Ledger:
    now = Instant(0.0, 0.0)
    record = OverlayRecord("job", "active", now, 0.0, placement_hash, 100, Source("job.yaml", 1, 1))
    return Ledger(overlays={"job": record})


def test_wrong_files_with_no_good_version_before_them_are_an_error(path: Path) -> None:
    path.write_text("endpoints: [")
    with pytest.raises(SpecError):
        keeper(path).load(Ledger())


@pytest.mark.parametrize("text", ["", "version: 1\nendpoints: {}\n", "endpoints: [", None])
def test_what_cannot_be_accepted_leaves_the_last_good_version_in_force(path: Path, text: str | None) -> None:
    specs = keeper(path)
    good = specs.load(Ledger())
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    bad = specs.load(Ledger())
    assert bad.spec == good.spec
    assert bad.problems
    assert bad.texts == good.texts
    assert keeper(path, dict(good.texts)).load(Ledger()).spec == good.spec
    path.write_text(SETPOINTS)
    assert specs.load(Ledger()).current


@pytest.mark.parametrize("fresh", [False, True], ids=["of this daemon", "of an earlier one"])
def test_while_files_are_wrong_the_last_good_version_is_not_worked_out_again(
    path: Path, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = keeper(path)
    specs.load(Ledger())
    if fresh:
        specs = keeper(path, dict(specs.in_force.texts))
    resolved: list[str] = []
    resolve = module.resolve_texts

    def count(setpoints: SourceText, overlays: tuple[SourceText, ...]) -> Spec:
        resolved.append(setpoints.text)
        return resolve(setpoints, overlays)

    (path.parent / "overlays" / "job.yaml").write_text("gpus: [")
    specs.load(Ledger())
    path.write_text("version: 2")
    bad = specs.load(Ledger())
    assert str(path) in {p.file for p in bad.problems}
    assert not bad.spec.problems, "of the files in force"
    monkeypatch.setattr(module, "resolve_texts", count)
    path.write_text("version: 3")
    again = specs.load(Ledger())
    assert again.spec is bad.spec
    assert again.problems != bad.problems
    assert specs.load(Ledger()) == again
    assert resolved == ["version: 3"], "once, and nothing of what is in force"


def test_wrong_files_that_an_env_file_alone_mends_are_in_force_once_it_is_mended(path: Path) -> None:
    specs = keeper(path)
    specs.load(Ledger())
    path.write_text(SETPOINTS.replace("port: 8080", "port: 8081, env_file: secrets"))
    assert not specs.load(Ledger()).current
    (path.parent / "secrets").write_text("TOKEN=a")
    (path.parent / "secrets").chmod(0o600)
    mended = specs.load(Ledger())
    assert mended.current
    assert mended.spec.endpoints["one"].port == 8081


def test_a_secret_of_the_last_good_version_that_changes_while_files_are_wrong_changes_its_process(path: Path) -> None:
    secret = path.parent / "secrets"
    secret.write_text("TOKEN=a")
    secret.chmod(0o600)
    path.write_text(SETPOINTS.replace("port: 8080", f"port: 8080, env_file: {secret}"))
    specs = keeper(path)
    good = specs.load(Ledger())
    path.write_text("version: 2")
    assert specs.load(Ledger()).spec == good.spec
    secret.write_text("TOKEN=another")
    changed = specs.load(Ledger())
    assert changed.spec.endpoints["one"].process_hash != good.spec.endpoints["one"].process_hash


def test_a_vanished_folder_keeps_its_overlays_and_an_emptied_one_does_not(path: Path) -> None:
    specs = keeper(path)
    specs.load(Ledger())
    folder = path.parent / "overlays"
    (folder / "job.yaml").rename(path.parent / "job.yaml")
    folder.rmdir()
    gone = specs.load(Ledger())
    assert set(gone.spec.overlays) == {"job"}
    assert any("folder is gone" in p.message for p in gone.problems)
    folder.mkdir()
    assert specs.load(Ledger()).spec.overlays == {}


@pytest.mark.parametrize("text", ["gpus: [", "version: 1\nmakespan: {}\n", "\x00"])
def test_a_broken_overlay_file_keeps_its_last_good_version_and_the_others_go_on(path: Path, text: str) -> None:
    specs = keeper(path)
    good = specs.load(Ledger()).spec.overlays["job"]
    (path.parent / "overlays" / "job.yaml").write_text(text)
    (path.parent / "overlays" / "next.yaml").write_text(OVERLAY)
    after = specs.load(Ledger())
    assert after.spec.overlays["job"] == good
    assert "next" in after.spec.overlays
    assert after.problems


def test_a_live_overlays_command_waits_for_its_end_and_its_duration_does_not(path: Path) -> None:
    specs = keeper(path)
    first = specs.load(Ledger())
    began = first.spec.overlays["job"]
    specs.load(live(began.placement_hash))
    edited = OVERLAY.replace("[render]", "[other]").replace("5m", "9m")
    (path.parent / "overlays" / "job.yaml").write_text(edited)
    held = specs.load(live(began.placement_hash))
    overlay = held.spec.overlays["job"]
    assert overlay.workload is not None
    assert overlay.workload.command == ("render",)
    assert overlay.makespan.duration_s == 540
    assert overlay.change_pending
    later = keeper(path, dict(held.texts)).load(live(began.placement_hash)).spec.overlays["job"]
    assert later.placement_hash == began.placement_hash, "the next daemon holds it as well"
    ended = specs.load(Ledger()).spec.overlays["job"]
    assert ended.workload is not None
    assert ended.workload.command == ("other",)


def test_on_edit_replace_takes_the_new_command_at_once(path: Path) -> None:
    specs = keeper(path)
    began = specs.load(Ledger()).spec.overlays["job"]
    specs.load(live(began.placement_hash))
    edited = OVERLAY.replace("[render]", "[other]") + "on_edit: replace\n"
    (path.parent / "overlays" / "job.yaml").write_text(edited)
    overlay = specs.load(live(began.placement_hash)).spec.overlays["job"]
    assert overlay.workload is not None
    assert overlay.workload.command == ("other",)


def test_a_secret_that_changed_in_its_file_changes_the_process(path: Path) -> None:
    secrets = path.parent / "secrets.env"
    secrets.write_text("TOKEN=one\n")
    path.write_text(SETPOINTS.replace("port: 8080", "port: 8080, env_file: secrets.env"))
    specs = keeper(path)
    before = specs.load(Ledger()).spec.endpoints["one"].process_hash
    secrets.write_text("TOKEN=another\n")
    assert specs.load(Ledger()).spec.endpoints["one"].process_hash != before


def test_while_nothing_is_edited_each_look_has_the_same_spec_and_a_daemon_reads_its_files_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is worked out of a spec is kept by the spec that it was worked out of."""
    read: list[str] = []
    resolve = module.resolve_texts
    monkeypatch.setattr(module, "resolve_texts", lambda *texts: (read.append(""), resolve(*texts))[1])
    first = keeper(path).load(Ledger())
    read.clear()
    specs, ledger = keeper(path, dict(first.texts)), live(first.spec.overlays["job"].placement_hash)
    looks = [specs.load(ledger) for _ in range(3)]
    assert looks[0].spec == first.spec
    assert all(look.spec is looks[0].spec for look in looks)
    assert len(read) == 1

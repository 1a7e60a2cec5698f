"""Which spec is in force when files are edited, broken, emptied or gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.clock import Instant
from reconciler.errors import SpecError
from reconciler.loop import specs as module
from reconciler.loop.specs import SpecKeeper
from reconciler.plan.ledger import Ledger, OverlayRecord
from reconciler.spec.spec import Source

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

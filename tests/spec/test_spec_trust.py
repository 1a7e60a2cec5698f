"""Whom a file is taken from: its owner, its group, its folder, and links to it."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.errors import SpecError
from reconciler.spec import trust
from reconciler.spec.load import load_setpoints, read_texts
from reconciler.spec.trust import UntrustedError, read_trusted

SETPOINTS = "version: 1\nendpoints:\n  a: {model: m, port: 1}\n"
JOB = "version: 1\nmakespan: {duration: 5m}\ngpus: 1\n"
STRANGER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    made = folder / "a.yaml"
    made.write_text(JOB)
    made.chmod(0o644)
    return made


def user(name: str, uid: int, gid: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh"))


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A user database of this user, `me`, alone in a group of that name; a test changes it."""
    gid = os.getegid()
    known: dict[str, object] = {
        "group": grp.struct_group(("me", "x", gid, ["me"])),
        "users": [user("me", os.geteuid(), gid), user("ann", 7001, 7001)],
    }
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: known["group"])
    monkeypatch.setattr(pwd, "getpwall", lambda: known["users"])
    trust._is_private.cache_clear()
    yield known
    trust._is_private.cache_clear()


def refusal(path: Path) -> tuple[str, str]:
    """Why it is not read, and what is to be done about it."""
    with pytest.raises(UntrustedError) as caught:
        read_trusted(str(path))
    return caught.value.strerror, caught.value.hint


# ---------------------------------------------------------------- groups


def test_a_file_that_only_ones_own_group_may_write_is_read(file: Path, accounts: dict[str, object]) -> None:
    file.chmod(0o664)
    file.parent.chmod(0o775)
    assert read_trusted(str(file)) == JOB.encode()


@pytest.mark.parametrize(
    "change",
    [
        {"group": grp.struct_group(("me", "x", 7001, ["me", "ann"]))},
        {"group": grp.struct_group(("team", "x", 7001, ["me"]))},
        {"group": grp.struct_group(("team", "x", 7001, []))},
        {"users": [user("me", os.geteuid(), os.getegid()), user("ann", 7001, os.getegid())]},
        {"users": [user("ann", 7001, 7001)]},
    ],
    ids=["a second member", "a shared group", "a group of none that are named", "anothers own group too", "no account"],
)
def test_a_file_that_a_group_of_others_may_write_is_not_read(
    file: Path, accounts: dict[str, object], change: dict[str, object]
) -> None:
    accounts |= change
    file.chmod(0o664)
    group = accounts["group"]
    assert isinstance(group, grp.struct_group)
    assert refusal(file) == (
        f"can be written by group {group.gr_name}", f"it decides what is run here: chmod g-w {file}"
    )  # fmt: skip
    file.chmod(0o644)
    assert read_trusted(str(file)) == JOB.encode()
    file.parent.chmod(0o775)
    assert refusal(file)[0] == f"lies in {file.parent}, which can be written by group {group.gr_name}"


def test_a_group_that_the_database_does_not_know_is_one_of_others(
    file: Path, accounts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(gid: int) -> grp.struct_group:
        raise KeyError(gid)

    monkeypatch.setattr(grp, "getgrgid", unknown)
    file.chmod(0o664)
    assert refusal(file)[0] == f"can be written by group {file.stat().st_gid}"


def test_the_database_is_asked_once_and_again_when_it_changed(
    file: Path, accounts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.chmod(0o664)
    read_trusted(str(file))
    accounts["group"] = grp.struct_group(("me", "x", os.getegid(), ["me", "ann"]))
    read_trusted(str(file))
    monkeypatch.setattr(trust, "_stamp", lambda _path: 1)
    refusal(file)


@needs_root
def test_the_real_database_tells_a_group_of_ones_own_from_a_shared_one(file: Path) -> None:
    trust._is_private.cache_clear()
    file.chmod(0o664)
    others = [u for u in pwd.getpwall() if u.pw_gid == 0 and u.pw_uid != 0] or grp.getgrgid(0).gr_mem
    os.chown(file, 0, 0)
    if others:
        refusal(file)
    else:
        read_trusted(str(file))
    os.chown(file, 0, pwd.getpwnam("nobody").pw_gid)
    refusal(file)


def test_an_access_control_list_counts(
    file: Path, accounts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # named entries are bounded by the mask, which the mode shows as the group's rights
    monkeypatch.setattr(os, "getxattr", lambda _file, _name: b"\x02\x00\x00\x00")
    assert read_trusted(str(file)) == JOB.encode()
    file.chmod(0o664)
    assert refusal(file) == (
        "can be written by whom its access control list names", f"it decides what is run here: setfacl -b {file}"
    )  # fmt: skip


# ---------------------------------------------------------------- folders


def test_a_file_in_a_folder_that_everybody_may_write_is_not_read(file: Path) -> None:
    file.parent.chmod(0o777)
    assert refusal(file) == (
        f"lies in {file.parent}, which can be written by everybody", f"what lies there is run: chmod o-w {file.parent}"
    )  # fmt: skip


def test_in_a_sticky_folder_ones_own_files_are_read(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert read_trusted(str(file)) == JOB.encode()


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_folder_of_another_user_holds_nothing_that_is_read(file: Path, mode: int) -> None:
    file.parent.chmod(mode)
    os.chown(file.parent, STRANGER, -1)
    assert refusal(file)[0] == f"lies in {file.parent}, which belongs to another user (uid {STRANGER})"


def test_an_overlays_folder_that_others_may_write_is_told_once_and_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "setpoints.yaml").write_text(SETPOINTS)
    (tmp_path / "overlays").mkdir()
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / "overlays" / name).write_text(JOB)
    (tmp_path / "overlays").chmod(0o777)
    texts = read_texts(tmp_path / "setpoints.yaml")
    assert texts.overlays is None
    (problem,) = load_setpoints(tmp_path / "setpoints.yaml").problems
    assert problem.file == str(tmp_path / "overlays")
    assert problem.message == "can be written by everybody"  # and it does not lie in itself
    assert "chmod o-w" in (problem.hint or "")


def test_set_points_in_a_folder_that_others_may_write_are_refused(tmp_path: Path) -> None:
    (tmp_path / "setpoints.yaml").write_text(SETPOINTS)
    tmp_path.chmod(0o777)
    with pytest.raises(SpecError, match="which can be written by everybody"):
        load_setpoints(tmp_path / "setpoints.yaml")


# ---------------------------------------------------------------- links


def test_a_link_of_ones_own_is_followed_to_a_file_that_is_judged(file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.symlink_to("second.yaml")
    second.symlink_to(file)
    assert read_trusted(str(first)) == JOB.encode()
    file.parent.chmod(0o777)
    assert "lies in" in refusal(first)[0]
    file.parent.chmod(0o755)
    file.chmod(0o666)
    assert refusal(first)[0] == "can be written by everybody"


@needs_root
def test_a_link_of_another_user_is_not_followed(file: Path, tmp_path: Path) -> None:
    """As somebody might leave one in a sticky folder, to have one of our files run that was not meant to be."""
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    tmp_path.chmod(0o1777)
    assert refusal(link)[0] == f"is a symbolic link that belongs to another user (uid {STRANGER})"


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels"):
        read_trusted(str(tmp_path / "a"))


@pytest.mark.parametrize("name", ["", ".", "..", "none/a.yaml", "a.yaml/b"])
def test_odd_names_are_errors(file: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(OSError):
        read_trusted(name)


def test_a_name_without_a_folder_is_that_of_a_file_here(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert read_trusted(file.name) == JOB.encode()


def test_no_descriptor_is_left_behind(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for mode in (0o644, 0o666):
        file.chmod(mode)
        for _ in range(5):
            if mode == 0o644:
                read_trusted(str(link))
            else:
                refusal(link)
    assert len(list(Path("/proc/self/fd").iterdir())) == before

"""What a child finds in its environment: exactly what docs/operations.md lists."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from box_driver import Box, wait_for

from reconciler.act.environment import INHERITED, INHERITED_FAMILIES

pytestmark = pytest.mark.e2e
PAGE = (Path(__file__).parents[2] / "docs/operations.md").read_text("utf-8")
SECTION = PAGE.partition("### The environment of endpoints and workloads")[2].partition("\n## ")[0]
PROXIES = {f"{way}_proxy" for way in ("http", "https", "no", "all")}
OWN = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RECONCILER_SUBJECT", "RECONCILER_INCARNATION", "SPT_NOENV"}


def listed() -> tuple[set[str], set[str]]:
    """Names, and prefixes of families, as the page has them."""
    lists = SECTION.partition("Over that `env_file`")[0]
    words = {word for quoted in re.findall(r"`([^`]+)`", lists) for word in quoted.split()}
    families = {word for word in words if word.endswith("_")}
    return words - families, families


def test_the_page_lists_what_is_inherited_and_nothing_else() -> None:
    names, families = listed()
    assert "the proxy variables in both spellings" in SECTION
    assert names | PROXIES | {name.upper() for name in PROXIES} == INHERITED
    assert families == set(INHERITED_FAMILIES)


def test_a_child_finds_what_the_page_lists_and_nothing_else(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    names, families = listed()
    passed = (names | PROXIES) - {"PATH", "HOME", "LD_LIBRARY_PATH"} | {f"{family}SOMETHING" for family in families}
    kept = {
        "HF_TOKEN", "SSH_AUTH_SOCK", "PYTHONSTARTUP", "DBUS_SESSION_BUS_ADDRESS", "MAIL", "OLDPWD",
        "CUDA_LAUNCH_BLOCKING", "KUBECONFIG", "SUDO_USER", "VIRTUAL_ENV", "RECONCILER_SETPOINTS_OF_OLD", "LS_COLORS",
        *(f"{family}{word}" for family in families for word in ("API_KEY", "TOKEN", "SECRET", "PASSWORD")),
    }  # fmt: skip
    for name in passed | kept:
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")  # Python sets it where it finds no locale (PEP 538)
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens")
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    (box.root / "some.env").write_text("FROM_FILE=1\nLANG=file\n")
    (box.root / "some.env").chmod(0o600)
    box.spec["endpoints"]["one"] = {
        "engine": "custom", "gpus": 0, "cwd": str(box.root),
        "env_file": "some.env", "env": {"FROM_SPEC": "1", "TZ": "spec"},
        "command": ["sh", "-c", "/usr/bin/env -0 > env.new && mv env.new env; exec sleep 600"],
    }  # fmt: skip
    box.write()
    box.start()
    wait_for((box.root / "env").exists, "the child says what it found")
    found = dict(item.split("=", 1) for item in (box.root / "env").read_text().split("\0") if item)
    shell = {"PWD", "OLDPWD", "SHLVL", "_"}  # of sh itself
    here = {name for name in (*INHERITED, *os.environ) if name in os.environ and name in INHERITED}
    families_here = {n for n in os.environ if n.startswith(tuple(families)) and n not in kept}
    expected = passed | here | families_here | OWN | {"FROM_FILE", "FROM_SPEC", "RECONCILER_SIM_DIR"}
    assert set(found) - shell == expected - shell
    assert (found["LANG"], found["TZ"], found["FROM_FILE"]) == ("file", "spec", "1")
    assert found["HF_HOME"] == "value of HF_HOME"
    assert (found["CUDA_VISIBLE_DEVICES"], found["CUDA_DEVICE_ORDER"]) == ("", "PCI_BUS_ID")
    assert found["RECONCILER_SUBJECT"] == "one"

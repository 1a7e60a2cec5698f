"""The documents: their links lead somewhere, and they leave no reason code unexplained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
CONCEPTS = ROOT / "docs/concepts.md"

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CAMEL = re.compile(r"([A-Z][a-z]+(?:[A-Z][a-z]+)+)(?::|$)")
"""A code, alone or in front of its message."""
TELLERS = ("Blocked", "Refusal", "_condition")
"""Calls that take a code as `reason`, or among their first two arguments."""


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The names that a forge gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_code_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def codes_in(tree: ast.Module) -> Iterator[str]:
    """Every reason code in one module.

    Strings in CamelCase of two words or more, wherever they stand (tables of rules, messages that begin with one); and
    any word with a capital that is handed to one of `TELLERS`, or stands in the rules of why a GPU is unusable.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := CAMEL.match(node.value)):
            yield found[1]
        words: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TELLERS:
            words = [*node.args[:2], *(k.value for k in node.keywords if k.arg == "reason")]
        elif isinstance(node, ast.FunctionDef) and node.name == "_unusable":
            words = [n for n in ast.walk(node) if isinstance(n, ast.Constant)]
        for word in words:
            if isinstance(word, ast.Constant) and re.fullmatch(r"[A-Z][A-Za-z]+", str(word.value)):
                yield str(word.value)


def all_codes() -> set[str]:
    files = sorted((ROOT / "reconciler/plan").glob("*.py"))
    return {code for file in files for code in codes_in(ast.parse(file.read_text("utf-8")))} - {"None", "True", "False"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in LINK.findall(without_code_blocks(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{page.name}: {link}"


def test_the_codes_that_everybody_meets_are_found() -> None:
    assert {"NoConsent", "PortInUse", "EvictedBy", "WaitingForVram", "Quarantined", "CoolDown"} <= all_codes()


@pytest.mark.parametrize("code", sorted(all_codes()))
def test_every_reason_code_is_explained(code: str) -> None:
    assert f"`{code}`" in CONCEPTS.read_text("utf-8"), f"docs/concepts.md does not explain {code}"


def test_decisions_are_numbered_without_gaps_and_short() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{n:04}" for n in range(1, len(pages) + 1)]
    for page in pages:
        lines = page.read_text("utf-8").splitlines()
        assert len(lines) <= 30, page.name
        assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequence"]


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", (ROOT / "docs/reliability.md").read_text("utf-8")))
    there = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        there |= set(re.findall(r"^def (test_[a-z0-9_]+)", file.read_text("utf-8"), re.MULTILINE))
    assert len(named) > 30
    assert named <= there


def test_each_of_the_planners_promises_has_a_test() -> None:
    rows = re.findall(
        r"^\| (\d+) \| .* \| `test_[a-z0-9_]+` \|", (ROOT / "docs/reliability.md").read_text("utf-8"), re.MULTILINE
    )
    assert [int(number) for number in rows] == list(range(1, 27))


def test_every_test_that_a_page_names_is_a_test_of_the_suite() -> None:
    suite = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
    there = set(re.findall(r"^ *(?:async )?def (test_\w+)\(", suite, re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8"))}
    assert len(named) > 50
    assert not named - there

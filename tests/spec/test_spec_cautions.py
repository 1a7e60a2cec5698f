"""Placeholders that nothing is filled in for: warned of where they look like a slip, and left alone elsewhere."""

from __future__ import annotations

import pytest

from reconciler.spec.cautions import cautions
from reconciler.spec.texts import SourceText


def told(*words: str, section: str = "endpoints") -> list[str]:
    """What is said of an endpoint's command."""
    command = "".join(f"    - {word!r}\n" for word in words)
    text = f"version: 1\n{section}:\n  a:\n    command:\n{command}"
    return [str(problem) for problem in cautions(SourceText("f.yaml", text))]


@pytest.mark.parametrize("section", ["endpoints", "set"])
def test_a_slip_of_one_letter_is_warned_of_at_its_place_with_what_was_meant(section: str) -> None:
    (said,) = told("serve", "--port={prot}", "{port}", section=section)
    assert said.startswith("f.yaml:6:7: {prot} is passed as it is written")
    assert "did you mean {port}?" in said


@pytest.mark.parametrize("word", ["{ports}", "{PORT}", "{modle}", "{gpu}", "{memroy}", "x{prt}y"])
def test_other_slips_are_warned_of_as_well(word: str) -> None:
    assert len(told("serve", word)) == 1


def test_what_is_filled_in_elsewhere_alone_is_warned_of_too() -> None:
    (said,) = told("serve", "--host", "{host}")
    assert "filled in are {port} {model} {gpus} {memory}" in said


@pytest.mark.parametrize(
    "word", ["{port}", "{prompt}", "{}", "{name}", '{"prot": 1}', "${PROT}", "{{prot}}", "a{1,2}", "{prot", "{import}"]
)
def test_braces_of_the_programs_own_are_left_alone(word: str) -> None:
    assert told("serve", word) == []


def test_nothing_is_filled_in_in_the_command_of_a_workload_so_nothing_is_missing_there() -> None:
    text = "version: 1\nworkload:\n  command: [render, '{prot}']\n"
    assert cautions(SourceText("o.yaml", text)) == ()

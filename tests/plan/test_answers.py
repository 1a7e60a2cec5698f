"""Answers that are worked out when somebody asks."""

from __future__ import annotations

import pytest

from reconciler.plan.answers import Answers


def test_each_name_is_asked_about_once_and_only_if_somebody_looks() -> None:
    asked: list[str] = []

    def answer(name: str) -> str:
        asked.append(name)
        return name.upper()

    answers = Answers(("b", "a", "c"), answer)
    assert (list(answers), len(answers), "c" in answers, asked) == (["b", "a", "c"], 3, True, [])
    answers["c"] = "told"
    assert (answers["a"], answers["a"], answers["c"], asked) == ("A", "A", "told", ["a"])
    assert repr(answers) == repr({"b": "B", "a": "A", "c": "told"})
    assert asked == ["a", "b"]


def test_a_name_that_is_not_among_them_has_no_answer() -> None:
    answers = Answers(("a",), str.upper)
    with pytest.raises(KeyError):
        answers["b"]
    assert "b" not in answers
    assert not Answers[str]()

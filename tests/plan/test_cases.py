"""Set points and a box in, the exact text of the plan out: one file of `cases/` each (`case_file.py` explains them).

`REWRITE_CASES=1 pytest tests/plan/test_cases.py -s` has every file expect what comes out now and prints the difference;
read it before you commit it.
"""

from __future__ import annotations

import difflib
import os

import pytest
from case_file import Case, read_cases

CASES = read_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.stem)
def test_the_plan_reads_exactly_as_its_case_says(case: Case) -> None:
    text = case.run()
    if os.environ.get("REWRITE_CASES") and text != case.expected:
        old, new = case.expected.splitlines(), text.splitlines()
        print("\n" + "\n".join(difflib.unified_diff(old, new, case.path.name, case.path.name, lineterm="")))
        case.rewrite(text)
        return
    assert text == case.expected, case.content["about"]


def test_every_case_says_what_it_shows() -> None:
    assert len(CASES) >= 25
    sentences = [case.content["about"] for case in CASES]
    assert len(set(sentences)) == len(sentences)

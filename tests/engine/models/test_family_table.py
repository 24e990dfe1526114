"""docs/families.md: it lists the families of the transformers that it names, each as the walk treats it."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from shrunk_families import NOT_RUN, families

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "families.md").read_text()
ROWS = {line.split(" | ")[0].strip("| "): line for line in PAGE.splitlines() if line.startswith("| ")}
ROWS.pop("family")


def test_the_page_lists_every_family() -> None:
    named = re.search(r"Every family of transformers ([\d.]+)", PAGE)
    assert named is not None
    if named[1] != version("transformers"):
        pytest.skip(f"the page is that of transformers {named[1]}; run tests/support/family_table.py")
    assert list(ROWS) == families()


@pytest.mark.parametrize("family", ROWS)
def test_a_row_says_whether_the_walk_has_the_family(family: str) -> None:
    last = ROWS[family].split(" | ")[-1].rstrip(" |")
    assert last == NOT_RUN[family] if family in NOT_RUN else last.startswith("yes")

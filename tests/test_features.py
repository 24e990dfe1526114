"""docs/features.md: every row names a test that exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "features.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", TEXT)))
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| feature")
]


@cache
def functions_of(file: Path) -> frozenset[str]:
    """The names of the functions that ``file`` defines at its top."""
    return frozenset(
        node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
    )


def test_the_table_has_rows() -> None:
    assert len(NAMED) > 25
    assert len(ROWS) > 60


@pytest.mark.parametrize("named", NAMED)
def test_named_test_exists(named: str) -> None:
    file, _, name = named.partition("::")
    assert (ROOT / file).is_file(), f"docs/features.md names {file}, which does not exist"
    assert name in functions_of(ROOT / file), f"{file} has no function {name!r}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_every_row_names_its_test(row: list[str]) -> None:
    last = row[-1].rstrip("| ")
    assert "::" in last or last == "the same"

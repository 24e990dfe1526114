"""docs/features.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/features.md").read_text())))


def test_the_table_names_tests() -> None:
    assert len(NAMED) > 25


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda value: value or "file")
def test_named_test_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\b" if name else "^", (ROOT / file).read_text(), re.MULTILINE)

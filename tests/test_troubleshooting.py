"""docs/troubleshooting.md: every message is one that the sources can print, and every row's test exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    if line.startswith("|") and "::" in line
]
# What Slurm, Python and the kernel say: no source of xpar has these words.
OTHERS_SAY = {
    "srun: error: n2: task 1: Killed",
    "Timeout (0:05:00)!",
    "Fatal Python error: Segmentation fault",
    "can not load PMIx library",
    "More processors requested than permitted",
    "SIGKILL",
    "SIGSEGV",
    "SystemExit",
    "srun",
    "SLURM_LOCALID",
}
# A value in a message: "…" on the page, "{…}" in a source. It may be a few words long, and no longer.
VALUE = r"[^\n]{0,80}?"


@cache
def sources() -> str:
    """All that xpar and its scripts can print; literals that are split over lines are joined."""
    files = [p for room in ("engine", "comm", "kernels", "scripts") for p in (ROOT / room).rglob("*")]
    text = "\n".join(p.read_text() for p in files if p.is_file() and p.suffix in (".py", ".sh", ".sbatch"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def can_be_printed(message: str) -> bool:
    """Whether a source has the parts of ``message`` in this order, with nothing but values between them."""
    parts = [re.escape(part.strip()) for part in message.split("…")]
    return re.search(VALUE.join(parts), sources()) is not None


def test_the_page_has_rows_and_no_word_too_many_is_excused() -> None:
    assert len(ROWS) > 30
    quoted = {text for row in ROWS for text in re.findall(r"`([^`]+)`", row[0])}
    assert quoted >= OTHERS_SAY
    # Whatever is excused must need it.
    assert not {text for text in OTHERS_SAY if " " in text and can_be_printed(text)}


def test_reworded_messages_are_noticed() -> None:
    assert can_be_printed(": failed on … of … ranks of group")
    assert not can_be_printed(": went wrong on … of … ranks of group")
    assert not can_be_printed("ranks of group … : failed on … of")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_messages_can_be_printed_and_the_test_exists(row: list[str]) -> None:
    message, cause, remedy, test = row
    assert cause and remedy
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for quoted in re.findall(r"`([^`]+)`", message):
        assert quoted in OTHERS_SAY or can_be_printed(quoted), quoted

"""docs/troubleshooting.md: every message is one that the sources can print, and every row's test exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    if line.startswith("|") and "::" in line
]
SPELLED = (
    "srun: error: n2: task 1: Killed",
    "plan layer 4: failed on 1 of",
    "SystemExit, see above; where every rank is:",
    "Timeout (0:05:00)!",
    "Fatal Python error: Segmentation fault",
    "can not load PMIx library",
    "More processors requested than permitted",
    "SIGKILL",
    "SIGSEGV",
    "srun",
    "SLURM_LOCALID",
)
"""What Slurm and Python say, and messages with their values in them."""


def sources() -> str:
    """All that xpar and its scripts can print, literals that are split over lines joined."""
    files = [
        p
        for room in ("engine", "comm", "kernels", "scripts")
        for p in (ROOT / room).rglob("*")
        if p.is_file()
    ]
    text = "\n".join(p.read_text(errors="ignore") for p in files if p.suffix in (".py", ".sh", ".sbatch"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_row(row: list[str]) -> None:
    message, cause, remedy, test = row
    assert cause and remedy
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    text = sources()
    for quoted in re.findall(r"`([^`]+)`", message):
        for part in quoted.split("…"):
            assert part.strip() in text or quoted in SPELLED, part

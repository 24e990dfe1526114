"""The folder of a sweep: JSON lines as they come, then the report, and the plot where it can be drawn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpar.engine.bench.scaling import plot
from xpar.engine.bench.scaling.markdown_report import markdown, measured

LINES, REPORT, PLOT = "scaling.jsonl", "report.md", "scaling.png"


def open_folder(folder: Path) -> None:
    """Make ``folder``; ValueError if it holds a sweep already."""
    if (folder / LINES).exists():
        raise ValueError(f"{folder / LINES}: exists; move it away, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Write one record: what a job that is cut off had measured is there."""
    with open(folder / LINES, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The records in ``folder``; ValueError, OSError where there are none."""
    lines = (folder / LINES).read_text().splitlines()
    try:
        records = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{folder / LINES}: {error}; not the JSON lines of xpar bench scaling") from None
    if not records or not all(
        isinstance(r, dict) and {"mode", "what", "manifest"} <= r.keys() for r in records
    ):
        raise ValueError(f"{folder / LINES}: holds no records of xpar bench scaling")
    return records


def write_report(folder: Path, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Write report and plot; why there is no plot, if there is none."""
    why = "no point was measured" if not measured(records) else plot.missing()
    if why is None:
        plot.draw(records, folder / PLOT)
    (folder / REPORT).write_text(markdown(records, PLOT if why is None else None))
    return why

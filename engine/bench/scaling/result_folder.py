"""The folder of a study: results as JSON lines, the report, and the plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xpar.engine.bench.scaling import plot
from xpar.engine.bench.scaling.markdown_report import format_report, select_measured

LINES, REPORT, PLOT = "scaling.jsonl", "report.md", "scaling.png"


def open_folder(folder: Path) -> None:
    """Make ``folder``; raise ValueError if it holds a study already."""
    if (folder / LINES).exists():
        raise ValueError(f"{folder / LINES}: exists; move it away, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)


def append(folder: Path, result: Mapping[str, Any]) -> None:
    """Append one result at once, so that a job that is cut off leaves what it had measured."""
    with open(folder / LINES, "a") as file:
        file.write(json.dumps(result) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Read the results in ``folder``; raise ValueError or OSError if it has none."""
    lines = (folder / LINES).read_bytes().splitlines()
    try:
        results = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{folder / LINES}: {error}; not the JSON lines of xpar bench scaling") from None
    required = {"mode", "what", "manifest"}
    if not results or not all(isinstance(r, dict) and required <= r.keys() for r in results):
        raise ValueError(f"{folder / LINES}: holds no results of xpar bench scaling")
    return results


def write_report(folder: Path, results: Sequence[Mapping[str, Any]]) -> str | None:
    """Write report and plot; return the reason if there is no plot."""
    no_plot = "no point was measured" if not select_measured(results) else plot.find_missing()
    if no_plot is None:
        plot.draw(results, folder / PLOT)
    (folder / REPORT).write_text(format_report(results, PLOT if no_plot is None else None))
    return no_plot

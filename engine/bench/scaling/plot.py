"""The plot of a study: time, efficiency, stages and bytes over ranks, a row per mode."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xpar.engine.bench.scaling.markdown_report import Result, select_measured
from xpar.engine.bench.scaling.points import MODES, format_baseline
from xpar.engine.console.terminal import count
from xpar.engine.layer.stage_timer import STAGES

# Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/).
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = [
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
]
STAGE_COLOURS = dict(zip(STAGES, (SKY, YELLOW, BLUE, GREEN, ORANGE, PURPLE, RED), strict=True))
REST = "#BBBBBB"

Panel = Callable[[Any, Sequence[Result]], None]
"""Draws one panel of results on the axes of matplotlib."""


def find_missing() -> str | None:
    """Return what is missing for a plot and how to install it, or None."""
    return None if find_spec("matplotlib") else "matplotlib is not installed (pip install 'xpar[plot]')"


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the plot into the file ``path`` (.png). At least one result must be measured."""
    make_figure(results).savefig(path, dpi=120)


def make_figure(results: Sequence[Result]) -> Any:
    """Make the matplotlib figure of the results; a panel whose figures they lack is left out."""
    from matplotlib.figure import Figure

    found = select_measured(results)
    modes = [mode for mode in MODES if select_measured(found, mode)]
    panels = [panel for key, panel in PANELS.items() if all(key in r for r in found)]
    figure = Figure(figsize=(5.0 * len(panels), 4.4 * len(modes) + 0.6), layout="constrained")
    axes = figure.subplots(len(modes), len(panels), squeeze=False)
    for row, mode in zip(axes, modes, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            panel(axis, select_measured(found, mode))
    figure.suptitle(
        f"{found[0]['what']}: {count(found[0]['threads'], 'thread')} a rank at every point", fontsize=14
    )
    return figure


def _time(axis: Any, results: Sequence[Result]) -> None:
    first, ranks = results[0], [r["ranks"] for r in results]
    middle = [r["ms"]["median"] for r in results]
    spread = [
        [r["ms"]["median"] - r["ms"]["min"] for r in results],
        [r["ms"]["max"] - r["ms"]["median"] for r in results],
    ]
    shrink = [first["ranks"] / r["ranks"] * r["tokens"] / first["tokens"] for r in results]
    ideal = [first["ms"]["median"] * part for part in shrink]
    axis.plot(ranks, ideal, "--", color=BLACK, label=f"ideal, from {format_baseline(first['baseline'])}")
    axis.errorbar(
        ranks, middle, yerr=spread, fmt="o-", color=BLUE, capsize=3, label="measured: median, min to max"
    )
    axis.set_yscale("log")
    _over_ranks(axis, results, "time", f"time of {'all answers' if 'prompts' in first else 'a step'} (ms)")
    _plain_ticks(axis.yaxis)
    axis.legend(fontsize=8)


def _efficiency(axis: Any, results: Sequence[Result]) -> None:
    baseline = format_baseline(results[0]["baseline"])
    values = [100 * r["efficiency"] for r in results]
    axis.axhline(100, linestyle="--", color=BLACK, label="ideal")
    axis.plot([r["ranks"] for r in results], values, "s-", color=RED, label="measured")
    axis.set_ylim(0, max(110.0, 1.1 * max(values)))
    _over_ranks(axis, results, "parallel efficiency", f"parallel efficiency (%)\nrelative to {baseline}")
    axis.legend(fontsize=8, loc="lower left")


def _stages(axis: Any, results: Sequence[Result]) -> None:
    places = range(len(results))
    bottom = [0.0] * len(results)
    for stage in STAGES:
        heights = [r["stages_ms"][stage]["mean"] for r in results]
        if max(heights) == 0:
            continue
        axis.bar(
            places,
            heights,
            bottom=bottom,
            color=STAGE_COLOURS[stage],
            label=stage,
            edgecolor="white",
            linewidth=0.5,
        )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    rest = [max(0.0, r["ms"]["median"] - b) for r, b in zip(results, bottom, strict=True)]
    axis.bar(
        places,
        rest,
        bottom=bottom,
        color=REST,
        label="between stages,\nslowest rank",
        edgecolor="white",
        linewidth=0.5,
    )
    names, label = _places(results)
    axis.set_xticks(list(places), names)
    axis.set_xlabel(label)
    axis.set_ylabel("time of a step (ms), mean over ranks")
    axis.set_title(f"{results[0]['mode']}: stages")
    axis.margins(x=0.1)
    # The legend stands beside the bars, with the first stage at the bottom as in the bars.
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bytes(axis: Any, results: Sequence[Result]) -> None:
    for key, label, style, colour in (
        ("all", "all rows, also for the own rank", "^:", GREEN),
        ("to_other_ranks", "to other ranks", "o-", BLUE),
        ("to_other_nodes", "to other nodes", "s--", RED),
    ):
        values = [r["dispatch_bytes"][key] / 1e6 for r in results]
        axis.plot([r["ranks"] for r in results], values, style, color=colour, label=label)
    most = max(r["dispatch_bytes"]["all"] for r in results) / 1e6
    axis.set_ylim(0, 1.4 * most or 1)  # room for the legend
    _over_ranks(axis, results, "bytes", "payload of a step's dispatch (MB), all ranks")
    axis.legend(fontsize=8, loc="upper left")


PANELS: dict[str, Panel] = {
    "ms": _time,
    "efficiency": _efficiency,
    "stages_ms": _stages,
    "dispatch_bytes": _bytes,
}
"""The key of the figures that each panel shows -> the panel."""


def _over_ranks(axis: Any, results: Sequence[Result], what: str, label: str) -> None:
    """Label the logarithmic axis of ranks with a tick at each point."""
    from matplotlib.ticker import NullLocator

    names, label_x = _places(results)
    axis.set_xscale("log", base=2)
    axis.set_xticks([r["ranks"] for r in results], names)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(label_x)
    axis.set_ylabel(label)
    axis.set_title(f"{results[0]['mode']}: {what}")
    axis.grid(alpha=0.3)


def _places(results: Sequence[Result]) -> tuple[list[str], str]:
    """Name each point and the axis of points, with the nodes if there are several."""
    if results[-1]["nodes"] == 1:
        return [str(r["ranks"]) for r in results], "ranks"
    return [f"{r['ranks']}\n({r['nodes']})" for r in results], "ranks (nodes)"


def _plain_ticks(axis: Any) -> None:
    """Write ticks as 10, 20, 50 in place of powers, and enough of them on a short axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

"""Rows of results of ``xpar bench kernels``, one for each layer and number of tokens, and their table."""

from typing import Any

from rich.table import Table as RichTable

from xpar.engine.bench.gpu_turns import Turns

INSTALLED = "installed"
_OWN = ("xpar", "former")


def expand_names(compare: str, installed: tuple[str, ...]) -> list[str]:
    """Return the contenders that ``--compare`` names; the word ``installed`` stands for all of those."""
    named = [name for name in compare.split(",") if name]
    return list(dict.fromkeys(n for name in named for n in (installed if name == INSTALLED else (name,))))


def cell_row(turns: Turns, calls: int) -> dict[str, Any]:
    """Return the results of a cell: seconds a call, ratios to xpar, the fastest peer, and the card.

    ``calls``: calls that a contender's graph holds.
    """
    row: dict[str, Any] = {f"{name} graph": turns.median(name) / calls for name in turns.seconds}
    if "xpar" in turns.seconds:
        others = [name for name in turns.seconds if name != "xpar"]
        row |= {f"{name} ratio": turns.ratio(name, "xpar") for name in others}
        fastest = turns.fastest(_OWN)
        if fastest:
            row |= {"fastest": fastest, "fastest ratio": turns.ratio(fastest, "xpar")}
    if turns.card:
        row |= {"mhz": turns.card.mhz, "watts": turns.card.watts}
    return row


def format_cell(row: dict[str, Any]) -> str:
    """Format a cell's results as one line."""
    times = [f"{k} {v * 1e6:.1f} us" for k, v in row.items() if k.endswith((" graph", " eager")) and v]
    ratios = [f"{k} {v:.3f}" for k, v in row.items() if k.endswith(" ratio")]
    card = [f"{row['mhz']:.0f} MHz, {row['watts']:.0f} W"] if "mhz" in row else []
    return ", ".join([*times, *ratios, *card])


def times_table(rows: list[dict[str, Any]]) -> RichTable:
    """Make the table of times in microseconds, beside the floor and the other contenders."""
    names = {key.removesuffix(" graph"): None for row in rows for key in row if key.endswith(" graph")}
    others = [name for name in names if name != "xpar"]
    columns = ("model", "M", "floor us", "graph us", "of floor", "eager us", "fastest peer: x longer")
    table = RichTable(*columns, title="xpar expert kernels")
    for other in others:
        table.add_column(f"{other} graph / eager: x longer", justify="right")
    for row in rows:
        ours, eager, floor = row.get("xpar graph"), row.get("xpar eager"), row.get("floor")
        fastest = f"{row['fastest']} {row['fastest ratio']:.2f}" if "fastest" in row else "-"
        cells = [row["model"], str(row["tokens"]), _us(floor), _us(ours)]
        cells += [f"{floor / ours:.0%}" if ours and floor else "-", _us(eager), fastest]
        for other in others:
            in_turn = row.get(f"{other} ratio")
            shown = f"{in_turn:.2f}" if in_turn else "-"
            cells.append(f"{shown} / {_ratio(row.get(f'{other} eager'), eager)}")
        table.add_row(*cells)
    return table


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.2f}" if theirs and ours else "-"

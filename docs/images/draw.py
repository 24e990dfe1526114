"""Draws the pictures of the documentation: ``python docs/images/draw.py`` writes the SVG files beside this
file."""

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
COLOURS = ("#d9e8fb", "#dff3e4", "#fdf0d5", "#f9dede")
"""One for each rank."""


class Drawing:
    """An SVG picture of boxes, arrows and texts; lengths in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [f"<title>{escape(title)}</title>", '<rect width="100%" height="100%" fill="white"/>']

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 13,
        colour: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        lines: tuple[str, ...] = (),
        size: int = 13,
    ) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{LINE}"/>'
        )
        top = y + height / 2 + size * 0.35 - (len(lines) - 1) * (size + 3) / 2
        for n, line in enumerate(lines):
            self.text(
                x + width / 2,
                top + n * (size + 3),
                line,
                size if n == 0 else size - 1,
                INK if n == 0 else SOFT,
                bold=n == 0 and len(lines) > 1,
            )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, wide: bool = False) -> None:
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" '
            f'stroke-width="{2.5 if wide else 1.2}" marker-end="url(#head)"/>'
        )

    def save(self, name: str) -> None:
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/>'
            "</marker></defs>"
        )
        body = "\n".join([head, *self.parts])
        (FOLDER / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="Helvetica, Arial, sans-serif" role="img">\n{body}\n</svg>\n'
        )


def pipeline() -> None:
    """The six stages of a layer, with the values between them."""
    d = Drawing(980, 250, "The six stages of a layer")
    steps = (
        ("route", "gate, top-k", "Routing"),
        ("plan", "who sends what", "DispatchPlan"),
        ("dispatch", "rows to experts", "ExpertInput"),
        ("compute", "own experts", "outputs"),
        ("combine", "rows home", "Distributed"),
        ("finish", "sum, all-reduce", "[T, H]"),
    )
    for n, (name, what, value) in enumerate(steps):
        x = 70 + n * 150
        moves = name in ("dispatch", "combine")
        d.box(x, 60, 112, 56, COLOURS[0] if moves else "#f5f7fa", (name, what))
        if n:
            d.arrow(x - 38, 88, x - 2, 88, wide=moves or steps[n - 1][0] in ("dispatch", "combine"))
        d.text(x + 56, 138, value, 12, SOFT)
    d.text(35, 84, "own", 12, SOFT)
    d.text(35, 99, "tokens", 12, SOFT)
    d.arrow(52, 88, 68, 88)
    d.arrow(934, 88, 962, 88)
    d.box(
        370,
        180,
        262,
        44,
        COLOURS[1],
        ("shared experts", "while rows travel, or on a stream of their own"),
        12,
    )
    d.arrow(126, 118, 368, 200)
    d.arrow(634, 200, 846, 120)
    d.text(432, 40, "MPI, NCCL or peer memory", 12, SOFT)
    d.text(732, 40, "MPI, NCCL or peer memory", 12, SOFT)
    d.text(170, 30, "one agreement of all ranks", 12, SOFT)
    d.arrow(200, 36, 250, 57)
    d.save("pipeline.svg")


def grid() -> None:
    """The process grid of eight ranks with tp = 2, ep = 2, etp = 2."""
    d = Drawing(820, 300, "The process grid of eight ranks")
    d.text(75, 42, "rank", 13, SOFT, "end")
    rows = (
        ("tokens (dp)", [f"batch {r // 2}" for r in range(8)], "tp pairs hold the same tokens"),
        (
            "experts (ep)",
            [("experts 0-3", "experts 4-7")[r // 2 % 2] for r in range(8)],
            "a moe group holds every expert once",
        ),
        ("slice (etp)", [f"half {r % 2}" for r in range(8)], "of the width of each expert"),
        ("copy (edp)", [f"copy {r // 4}" for r in range(8)], "two copies of all experts"),
    )
    for r in range(8):
        d.text(125 + r * 76, 42, str(r), 14, bold=True)
    for n, (name, cells, _) in enumerate(rows):
        y = 58 + n * 48
        d.text(78, y + 24, name, 12, SOFT, "end")
        for r, cell in enumerate(cells):
            kind = COLOURS[int(cell.split()[-1][0] not in "0") if name != "tokens (dp)" else r // 2]
            d.box(90 + r * 76, y, 70, 38, kind, (cell,), 11)
    for n, (_, _, note) in enumerate(rows):
        d.text(90 if n % 2 == 0 else 420, 268 + 18 * (n // 2), f"{rows[n][0]}: {note}", 12, SOFT, "start")
    d.save("grid.svg")


def dispatchers() -> None:
    """Draw who holds which rows after dispatch, with two tokens on each of two ranks."""
    d = Drawing(980, 676, "Who holds which rows after dispatch, for each dispatcher")
    d.text(
        490,
        26,
        "Tokens a1 a2 live on rank 0, b1 b2 on rank 1. "
        "a1 and b1 want experts of both ranks, a2 of rank 1, b2 of rank 1.",
        13,
    )
    ways = (
        (
            "replicated",
            ("a1 a2 b1 b2", "a1 a2 b1 b2"),
            "nothing moves: every rank has all tokens;",
            "outputs are addends of one all-reduce",
        ),
        (
            "allgather",
            ("a1 a2 b1 b2", "a1 a2 b1 b2"),
            "every token to every rank, no counts;",
            "outputs come home by reduce-scatter",
        ),
        (
            "alltoall",
            ("a1 b1", "a1 a2 b1 b2"),
            "one row per (token, rank), never per expert;",
            "each rank sums a token's slots before the row returns",
        ),
        (
            "shared-memory",
            ("a1 b1 (read in place)", "a1 a2 b1 b2 (in place)"),
            "rows are written once into a window of the node;",
            "experts read them there",
        ),
        (
            "hierarchical",
            ("a1 b1", "a1 a2 b1 b2"),
            "one row per (token, node) crosses the network;",
            "fan-out and first sum inside the node",
        ),
        (
            "one-sided",
            ("a1 b1", "a1 a2 b1 b2"),
            "kernels store rows into the peers' GPU memory;",
            "results are stored at the tokens' home",
        ),
        (
            "nccl-ep",
            ("a1 b1", "a1 a2 b1 b2"),
            "NCCL's EP extension, between nodes: a block of rows",
            "from each rank; the home adds ascending ranks",
        ),
    )
    for n, (name, held, first, second) in enumerate(ways):
        x, y = 20 + n % 2 * 480, 50 + n // 2 * 156
        d.box(x, y, 460, 140, "#fbfcfd")
        d.text(x + 14, y + 24, name, 14, anchor="start", bold=True)
        for rank in range(2):
            d.box(
                x + 14 + rank * 220, y + 38, 210, 46, COLOURS[rank], (f"rank {rank} computes", held[rank]), 12
            )
        d.text(x + 14, y + 106, first, 12, SOFT, "start")
        d.text(x + 14, y + 124, second, 12, SOFT, "start")
    d.save("dispatchers.svg")


if __name__ == "__main__":
    pipeline()
    grid()
    dispatchers()

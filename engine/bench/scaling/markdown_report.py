"""The report of a study in Markdown. Every relative figure names its baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

from xpar.engine.bench.scaling.points import MODES, format_baseline
from xpar.engine.console.terminal import count
from xpar.engine.layer.stage_timer import STAGES

Result = Mapping[str, Any]
WORK = {"strong": "the same {unit} in all", "weak": "the same {unit} a rank"}

THREADS = (
    "Every rank computes with {threads} at every point, also where it could have more cores: a point with "
    "twice the ranks has twice the threads."
)
BANDWIDTH = (
    "Ranks of one node share its memory's bandwidth. A single rank has all of it, which makes it a fast "
    "baseline; points of whole nodes compare like with like."
)
SPEED = (
    "Speed is tokens a second, of the slowest rank; parallel efficiency is the speed of a rank over that of "
    "a rank of the baseline, which the column's head names."
)

BYTES = (
    "MB are the payload of one dispatch, of all ranks together; the way back is not in them. With the "
    "dispatcher hierarchical a row counts once for each node that it goes to, and what ranks read there in "
    "place does not count."
)

RECORDED = (
    "The layer was replayed as a CUDA graph, as when decoding. Its stages and the column launched are of "
    "a step whose kernels are launched one by one."
)

ANSWERS = (
    "Answers are compared with those that the smallest point gave to the same prompts. Without --exact "
    "another number of ranks rounds otherwise, and a text may take another turn."
)


def format_report(results: Sequence[Result], plot: str | None) -> str:
    """Write the report on the results of one run; ``plot``: file name of the plot, if any."""
    parts = [f"# Scaling of {results[0]['what']}", _setting(results)]
    if plot is not None:
        parts.append(f"![time, efficiency, stages and bytes]({plot})")
    for mode in MODES:
        own = [r for r in results if r["mode"] == mode]
        if own:
            parts += _mode(mode, own)
    return "\n\n".join(parts) + "\n"


def select_measured(results: Sequence[Result], mode: str | None = None) -> list[Result]:
    """Return the results with figures, of ``mode`` or of both modes."""
    return [r for r in results if "reason" not in r and mode in (None, r["mode"])]


def select_wrong(results: Sequence[Result]) -> list[Result]:
    """Return the results whose output is wrong."""
    return [r for r in select_measured(results) if not r["correct"]]


def _setting(results: Sequence[Result]) -> str:
    """List machine, versions, command, and what was the same at every point."""
    largest = max(results, key=lambda r: r["ranks"])["manifest"]
    versions = largest["versions"]
    threads = largest["threads"]
    machine, nodes = largest["machine"], dict.fromkeys(n["host"] for n in largest["node_map"])
    num_nodes = count(len({n["node"] for n in largest["node_map"]}), "node")
    lines = (
        f"{machine['processor']}, {machine['cores']} cores a node; {num_nodes}: {', '.join(nodes)}",
        f"xpar {versions['xpar']}, torch {versions['torch']}, {versions['mpi']}, Python {versions['python']}",
        f"{largest['time']}, `{' '.join(largest['command'])}`",
        THREADS.format(threads=count(threads, "thread")),
        BANDWIDTH,
        SPEED,
        *((BYTES,) if any("dispatch_bytes" in r for r in results) else ()),
        *((RECORDED,) if any("recorded" in r for r in results) else ()),
        *((ANSWERS,) if any("prompts" in r for r in results) else ()),
    )
    return "\n".join(f"- {line}" for line in lines)


def _mode(mode: str, results: Sequence[Result]) -> list[str]:
    found = select_measured(results)
    unit = "prompts" if any("prompts" in r for r in found) else "tokens"
    parts = [f"## {mode.capitalize()} scaling: {WORK[mode].format(unit=unit)}"]
    if found:
        parts.append(_figures(found))
    if any("stages_ms" in r for r in found):
        parts.append("### Stages, ms: medians over steps, mean over ranks / slowest rank")
        parts.append(_stages(found))
    lost = [r for r in results if "reason" in r]
    if lost:
        parts.append("### Points that could not be measured")
        parts.append("\n".join(f"- {_place(r)}: {r['reason']}" for r in lost))
    bad = select_wrong(found)
    if bad:
        parts.append("### Points whose output is wrong")
        parts.append("\n".join(f"- {_place(r)}: {format_check(r)}" for r in bad))
    return parts


def _figures(found: Sequence[Result]) -> str:
    baseline = format_baseline(found[0]["baseline"])
    answers = "prompts" in found[0]
    head = ["ranks", "nodes", *(("prompts",) if answers else ()), "tokens", "ms (min to max)", "tokens/s"]
    head += [f"speed-up over {baseline}", f"parallel efficiency, relative to {baseline}", "imbalance"]
    moved = "dispatch_bytes" in found[0]
    head += ["MB to other ranks", "MB to other nodes", "dispatcher"] if moved else []
    head += ["launched, ms"] if "recorded" in found[0] else []
    rows = []
    for r in found:
        ms = r["ms"]
        row = [r["ranks"], r["nodes"], *((r["prompts"],) if answers else ()), r["tokens"]]
        row += [f"{ms['median']:.4g} ({ms['min']:.4g} to {ms['max']:.4g})", f"{r['tokens_per_s']:.4g}"]
        row += [f"{r['speedup']:.2f}", f"{r['efficiency']:.0%}", f"{r['imbalance']:.2f}"]
        if moved:
            sent = r["dispatch_bytes"]
            row += [
                f"{sent['to_other_ranks'] / 1e6:.3g}",
                f"{sent['to_other_nodes'] / 1e6:.3g}",
                r["dispatcher"],
            ]
        row += [f"{r['launched_ms']:.4g}" if "recorded" in r else "-"] if "recorded" in found[0] else []
        rows.append([*row, format_check(r)])
    return format_table([*head, "check"], rows)


def _stages(found: Sequence[Result]) -> str:
    rows = [
        [r["ranks"], *(f"{r['stages_ms'][s]['mean']:.3f} / {r['stages_ms'][s]['max']:.3f}" for s in STAGES)]
        for r in found
    ]
    return format_table(["ranks", *STAGES], rows)


def format_check(result: Result) -> str:
    """Format the check of an output and its verdict in a few words."""
    if "answers_compared" in result:
        same, compared = result["answers_same"], result["answers_compared"]
        text = f"{same} of {compared} answers as at the smallest point"
    else:
        text = f"relative error {result['rel_error']:.1e} of at most {result['tolerance']:.0e}"
        text += {None: "", True: ", same bits", False: ", OTHER BITS"}[result.get("same_bits")]
    return text if result["correct"] else f"WRONG: {text}"


def _place(result: Result) -> str:
    return f"{count(result['ranks'], 'rank')} on {count(result['nodes'], 'node')}"


def format_table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

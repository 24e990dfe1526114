"""``xpar bench scaling``: the sweep that the words ask for, told as it goes, and the report on it."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from xpar.comm.failure import AgreedError, agreed
from xpar.comm.world import World
from xpar.engine.bench.scaling import result_folder
from xpar.engine.bench.scaling.generate_study import AnswerCheck, GenerateStudy
from xpar.engine.bench.scaling.layer import LayerCheck
from xpar.engine.bench.scaling.layer_study import Axes, LayerStudy
from xpar.engine.bench.scaling.markdown_report import check_of, measured, wrong
from xpar.engine.bench.scaling.options import Plan, check_files, plan
from xpar.engine.bench.scaling.points import Point, baseline_name
from xpar.engine.bench.scaling.study import Study, sweep
from xpar.engine.commands.run import pick_device
from xpar.engine.commands.watching import attach
from xpar.engine.console.logs import start_logging
from xpar.engine.console.terminal import count, make_console
from xpar.engine.generation.request import read_request
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.parallelize import SpreadOptions


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; 1 if an output is wrong or no point could be measured."""
    if args.redraw:
        return _redraw(args)
    if args.what is None:
        raise AgreedError(
            "nothing to measure: give a shape or a checkpoint, or --redraw DIR for results that there are"
        )
    world = attach(args)
    start_logging(world, args.verbose)
    wanted = agreed(world.comm, lambda: plan(args, world.node_of))
    agreed(world.comm, lambda: check_files(args) if world.rank == 0 else None)
    # The same on every rank and at every point: else a rank would be another thing here than there.
    least = min(world.comm.all_gather_object(world.threads()))
    torch.set_num_threads(args.threads or (1 if args.prompts and args.exact else least))
    axes = Axes(args.tp, args.ep, args.etp, pick_device(world, args.device), args.transport)
    console = make_console(world)
    console.print(
        f"{wanted.name}: points of {', '.join(str(p.ranks) for p in wanted.points)} ranks of {world.size} on "
        f"{count(world.num_nodes, 'node')}; {count(torch.get_num_threads(), 'thread')} a rank at every point",
        soft_wrap=True,
    )
    study = (
        _answers(args, world, axes, wanted) if wanted.subject is None else _layer(args, world, axes, wanted)
    )

    def keep(record: dict[str, Any]) -> None:
        record["what"] = wanted.name
        result_folder.append(args.out, record)
        console.print(_line(record), soft_wrap=True)

    records = sweep(world, wanted.points, study, wanted.modes, keep)
    why = agreed(
        world.comm,
        lambda: result_folder.write_report(args.out, records) if world.rank == 0 else None,
        "report",
        patient=True,
    )
    console.print(_end(args, records, why), soft_wrap=True)
    return int(bool(wrong(records)) or not measured(records))


def _redraw(args: argparse.Namespace) -> int:
    """In one process, without MPI: results may be looked at elsewhere than where they were measured."""
    try:
        why = result_folder.write_report(args.redraw, result_folder.read(args.redraw))
    except (ValueError, OSError) as error:
        raise AgreedError(str(error)) from None
    Console(highlight=False).print(
        f"{args.redraw / result_folder.REPORT} is written" + (f"; no plot: {why}" if why else ""),
        soft_wrap=True,
    )
    return 0


def _layer(args: argparse.Namespace, world: World, axes: Axes, wanted: Plan) -> Study:
    """Rank 0 has the reference ready before the first point begins."""
    subject = wanted.subject
    assert subject is not None

    def check() -> LayerCheck | None:
        return LayerCheck(subject, args.seed, args.exact) if world.rank == 0 else None

    judge = agreed(world.comm, check, "reference", patient=True)
    return LayerStudy(subject, axes, args.tokens, wanted.per_rank, args.seconds, args.seed, judge)


def _answers(args: argparse.Namespace, world: World, axes: Axes, wanted: Plan) -> Study:
    request = wanted.answers
    assert request is not None
    tokens = agreed(world.comm, lambda: Tokenizer(request.checkpoint))
    listed = replace(request, out=request.out / "prompts.jsonl")
    work = read_request(world.comm, listed, tokens, resume=False)
    largest = wanted.points[-1].ranks

    def enough() -> None:
        if world.rank == 0:
            listed.out.unlink()  # the empty file of answers that prepare leaves
        least = largest if "weak" in wanted.modes else 1
        if len(work.queue) < least:
            raise ValueError(
                f"--prompts {args.prompts}: {count(len(work.queue), 'prompt')}, and the weak mode gives each of {largest} "
                "ranks at least one; use a longer file, or --only strong"
            )

    agreed(world.comm, enough)
    options = SpreadOptions(args.dispatcher, args.kernel, args.exact, slice_dense=True)
    return GenerateStudy(axes, request, work, tokens, options, largest, args.seconds, AnswerCheck(args.exact))


def _line(record: Mapping[str, Any]) -> str:
    """One point in one line, its speed never without what it is relative to."""
    head = f"{record['mode']}, {Point(record['ranks'], record['nodes'])}"
    if "reason" in record:
        return f"{head}: cannot be measured: {record['reason']}"
    return (
        f"{head}: {record['ms']['median']:.4g} ms, {record['tokens_per_s']:.4g} tokens/s, parallel efficiency "
        f"{record['efficiency']:.0%} relative to {baseline_name(record['baseline'])}; {check_of(record)}"
    )


def _end(args: argparse.Namespace, records: list[dict[str, Any]], why: str | None) -> str:
    written = f"{args.out / result_folder.LINES}, {result_folder.REPORT}"
    if why is None:
        return f"{written} and {result_folder.PLOT} are written"
    again = f", then xpar bench scaling --redraw {args.out}" if measured(records) else ""
    return f"{written} are written; no plot: {why}{again}"

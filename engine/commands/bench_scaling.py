"""``xpar bench scaling``: measure a layer or a model on more and more ranks of the job."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from xpar.comm.failure import AgreedError, agreed
from xpar.comm.world import World
from xpar.engine.bench.scaling import result_folder
from xpar.engine.bench.scaling.generate_study import AnswerCheck, GenerateStudy
from xpar.engine.bench.scaling.layer_source import CheckpointLayer, LayerSource, ShapeLayer
from xpar.engine.bench.scaling.layer_study import Axes, LayerCheck, LayerStudy
from xpar.engine.bench.scaling.markdown_report import format_check, select_measured, select_wrong
from xpar.engine.bench.scaling.points import MODES, Point, choose_points, format_baseline, read_numbers
from xpar.engine.bench.scaling.study import Plan, Study, run_study
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.commands.options import (
    PREFILL_TOKENS,
    at_least,
    attach,
    batch_size,
    check_positive,
    pick_device,
)
from xpar.engine.console.logs import start_logging
from xpar.engine.console.terminal import count, make_console
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.generation.request import Request, read_request
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.layer.build import FLOATS
from xpar.engine.layer.checkpoint_config import read_layer_config, read_layer_configs
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import TOLERANCE
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import SHAPES


def main(args: argparse.Namespace) -> int:
    """Run on every rank; return 1 if an output is wrong or no point could be measured."""
    if args.redraw:
        return _redraw(args.redraw)
    if args.source is None:
        raise AgreedError(
            "nothing to measure: give a shape or a checkpoint, or --redraw DIR for results that there are"
        )
    world = attach(args)
    start_logging(world, args.verbose)
    if args.source not in SHAPES:
        args.source = str(find_checkpoint(world.comm, Path(args.source)))
    plan = agreed(world.comm, lambda: read_plan(args, world.node_of))
    agreed(world.comm, lambda: _make_folders(args) if world.rank == 0 else None)
    # The same on every rank and at every point: otherwise the points would not compare.
    fewest = min(world.comm.all_gather_object(world.threads()))
    torch.set_num_threads(args.threads or (1 if args.prompts and args.exact else fewest))
    axes = Axes(args.tp, args.ep, args.etp, pick_device(world, args.device), args.transport)
    console = make_console(world)
    console.print(
        f"{plan.name}: points of {', '.join(str(p.ranks) for p in plan.points)} ranks of {world.size} on "
        f"{count(world.num_nodes, 'node')}; {count(torch.get_num_threads(), 'thread')} a rank at every point",
        soft_wrap=True,
    )
    make_study = _generate_study if isinstance(plan.source, Request) else _layer_study
    study = make_study(args, world, axes, plan)

    def keep(result: dict[str, Any]) -> None:
        result["what"] = plan.name
        result_folder.append(args.out, result)
        console.print(_format_point(result), soft_wrap=True)

    results = run_study(world, plan.points, study, plan.modes, keep)
    no_plot = agreed(
        world.comm,
        lambda: result_folder.write_report(args.out, results) if world.rank == 0 else None,
        "report",
        patient=True,
    )
    console.print(_format_end(args.out, results, no_plot), soft_wrap=True)
    return int(bool(select_wrong(results)) or not select_measured(results))


def read_plan(args: argparse.Namespace, node_of: tuple[int, ...]) -> Plan:
    """Check the whole request before any rank builds or writes; ValueError or OSError if it cannot be met."""
    at_least(
        tokens=(args.tokens, 1),
        tokens_per_rank=(args.tokens_per_rank, 1),
        max_new_tokens=(args.max_new_tokens, 1),
        batch=(args.batch, 1),
        threads=(args.threads, 1),
    )
    check_positive(seconds=args.seconds)
    points = choose_points(node_of, read_numbers("--ranks", args.ranks), read_numbers("--nodes", args.nodes))
    source = _read_generate_request(args) if args.prompts else _read_layer_source(args)
    return Plan(
        name=Path(args.source).name if isinstance(source, Request) else source.name,
        points=tuple(points),
        modes=(args.only,) if args.only else MODES,
        source=source,
        tokens_per_rank=args.tokens_per_rank or max(1, args.tokens // points[0].ranks),
    )


def _read_layer_source(args: argparse.Namespace) -> LayerSource:
    options = LayerOptions(args.dispatcher, args.kernel, args.exact)
    if args.source in SHAPES:
        config = SHAPES[args.source].layer(args.scale)
        dtype = FLOATS[args.dtype or "bfloat16"]
        scaled = "" if args.scale == 1 else f" x {args.scale:g}"
        return ShapeLayer(f"{args.source}{scaled}", SyntheticLayer(config, dtype, args.seed), options)
    with _open_checkpoint(args.source) as checkpoint:
        layer = next(iter(read_layer_configs(checkpoint))) if args.layer is None else args.layer
        config = read_layer_config(checkpoint, layer)
        dtype = _read_dtype(args, checkpoint)
        return CheckpointLayer(Path(args.source), layer, config.hidden_size, dtype, options)


def _read_generate_request(args: argparse.Namespace) -> Request:
    """Return the request whose ``out`` is the folder of the answers."""
    batch = batch_size(args)
    if args.tp not in (None, 1):
        raise ValueError(
            f"--tp {args.tp}: dense layers of whole models are not sliced; leave it out with --prompts"
        )
    with _open_checkpoint(args.source) as checkpoint:
        dtype = _read_dtype(args, checkpoint)
    return Request(
        checkpoint=Path(args.source),
        prompts=args.prompts,
        out=args.out / "answers",
        sampling=Sampling(0.0, 0, 1.0, args.seed),
        max_new_tokens=args.max_new_tokens,
        batch=batch,
        prefill_tokens=PREFILL_TOKENS,
        dtype=dtype,
        exact=args.exact,
    )


def _make_folders(args: argparse.Namespace) -> None:
    """Make the folder of the results, on the rank that reads prompts and writes results."""
    if args.prompts and not args.prompts.is_file():
        raise ValueError(f"{args.prompts}: no such file; give a text file or a .jsonl as --prompts")
    result_folder.open_folder(args.out)
    if args.prompts:
        (args.out / "answers").mkdir(exist_ok=True)


def _open_checkpoint(source: str) -> Checkpoint:
    if not Path(source).exists():
        raise ValueError(f"{source!r} is neither a shape nor a directory; the shapes are {', '.join(SHAPES)}")
    return open_checkpoint(source)


def _read_dtype(args: argparse.Namespace, checkpoint: Checkpoint) -> torch.dtype:
    dtype = FLOATS[args.dtype] if args.dtype else checkpoint.dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype {dtype}: choose --dtype {', '.join(sorted(FLOATS))}")
    return dtype


def _layer_study(args: argparse.Namespace, world: World, axes: Axes, plan: Plan) -> Study:
    """Make the study of a layer, for which rank 0 computes the reference; collective."""
    source = plan.source
    assert not isinstance(source, Request)

    def make_check() -> LayerCheck | None:
        return LayerCheck(source, args.seed, args.exact) if world.rank == 0 else None

    check = agreed(world.comm, make_check, "reference", patient=True)
    return LayerStudy(source, axes, args.tokens, plan.tokens_per_rank, args.seconds, args.seed, check)


def _generate_study(args: argparse.Namespace, world: World, axes: Axes, plan: Plan) -> Study:
    """Make the study of a whole model, with all prompts read. Collective."""
    request = plan.source
    assert isinstance(request, Request)
    tokenizer = agreed(world.comm, lambda: Tokenizer(request.checkpoint))
    listed = replace(request, out=request.out / "prompts.jsonl")
    work = read_request(world.comm, listed, tokenizer, resume=False)
    largest = plan.points[-1].ranks

    def check_prompts() -> None:
        if world.rank == 0:
            listed.out.unlink()  # the empty file of answers that read_request leaves
        least = largest if "weak" in plan.modes else 1
        if len(work.queue) < least:
            raise ValueError(
                f"--prompts {args.prompts}: {count(len(work.queue), 'prompt')}, and the weak mode gives each "
                f"of {largest} ranks at least one; use a longer file, or --only strong"
            )

    agreed(world.comm, check_prompts)
    options = SpreadOptions(args.dispatcher, args.kernel, args.exact, slice_dense=True)
    check = AnswerCheck(args.exact)
    return GenerateStudy(axes, request, work, tokenizer, options, largest, args.seconds, check)


def _redraw(folder: Path) -> int:
    """Write report and plot again without MPI: results may be looked at on another machine."""
    try:
        no_plot = result_folder.write_report(folder, result_folder.read(folder))
    except (ValueError, OSError) as error:
        raise AgreedError(str(error)) from None
    Console(highlight=False).print(
        f"{folder / result_folder.REPORT} is written" + (f"; no plot: {no_plot}" if no_plot else ""),
        soft_wrap=True,
    )
    return 0


def _format_point(result: Mapping[str, Any]) -> str:
    """Format one point as one line, in which every relative figure names its baseline."""
    head = f"{result['mode']}, {Point(result['ranks'], result['nodes'])}"
    if "reason" in result:
        return f"{head}: cannot be measured: {result['reason']}"
    speed = f"{result['ms']['median']:.4g} ms, {result['tokens_per_s']:.4g} tokens/s"
    baseline = format_baseline(result["baseline"])
    efficiency = f"parallel efficiency {result['efficiency']:.0%} relative to {baseline}"
    return f"{head}: {speed}, {efficiency}; {format_check(result)}"


def _format_end(folder: Path, results: list[dict[str, Any]], no_plot: str | None) -> str:
    """Format the last line: the files, and the reason if there is no plot."""
    files = f"{folder / result_folder.LINES}, {result_folder.REPORT}"
    if no_plot is None:
        return f"{files} and {result_folder.PLOT} are written"
    again = f", then xpar bench scaling --redraw {folder}" if select_measured(results) else ""
    return f"{files} are written; no plot: {no_plot}{again}"

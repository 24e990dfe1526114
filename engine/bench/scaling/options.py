"""The words of ``xpar bench scaling``, and what can be wrong with them before anything is measured."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from xpar.engine.architectures.layer_config import find, moe_layers
from xpar.engine.bench.scaling import result_folder
from xpar.engine.bench.scaling.layer_source import CheckpointLayer, LayerSource, ShapeLayer
from xpar.engine.bench.scaling.points import MODES, Point, numbers, points_of
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.commands.watching import add_watching
from xpar.engine.console.logs import add_verbose
from xpar.engine.generation.request import Request
from xpar.engine.generation.sampling import Sampling
from xpar.engine.layer.build import FLOATS, read_layer_config
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import TOLERANCE
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import SHAPES

BATCH = 16
PREFILL_TOKENS = 4096


def add_options(p: argparse.ArgumentParser) -> None:
    """Add them to ``p``."""
    p.add_argument(
        "what",
        metavar="SHAPE|CHECKPOINT",
        nargs="?",
        help=f"a layer with random weights, {', '.join(SHAPES)}; or one of a checkpoint's directory",
    )
    p.add_argument(
        "--prompts", type=Path, metavar="FILE", help="answer them with the whole checkpoint instead"
    )
    p.add_argument("--ranks", metavar="N,N", help="numbers of ranks (default: powers of two, and all)")
    p.add_argument("--nodes", metavar="N,N", help="numbers of whole nodes, in place of ranks or besides")
    p.add_argument("--only", choices=MODES, help="leave out the other mode")
    p.add_argument("--tokens", type=int, default=4096, help="strong: of every point (default 4096)")
    p.add_argument(
        "--tokens-per-rank",
        type=int,
        help="weak: of every rank (default: as many as in the smallest strong point)",
    )
    p.add_argument("--layer", type=int, help="of a checkpoint (default: its first with experts)")
    p.add_argument("--scale", type=float, default=1.0, help="multiply H and I of a shape by this, up to 1")
    p.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default 32)")
    p.add_argument(
        "--batch", type=int, help=f"sequences a rank runs at a time (default {BATCH}; 1 with --exact)"
    )
    p.add_argument("--seconds", type=float, default=1.0, help="of measuring, a mode and point (default 1)")
    for axis, what in (("tp", "tensor"), ("ep", "expert"), ("etp", "expert tensor")):
        p.add_argument(f"--{axis}", type=int, help=f"{what}-parallel ranks, at every point")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as for xpar run")
    p.add_argument("--transport", default="auto", help="between GPUs: auto, nccl, staged or mpi")
    p.add_argument("--dispatcher", default="auto", help="auto, or a dispatcher's name")
    p.add_argument("--kernel", default="auto", help="auto, or a kernel's name")
    p.add_argument(
        "--exact", action="store_true", help="bits that do not depend on the number of ranks; checked"
    )
    p.add_argument("--dtype", choices=sorted(FLOATS), help="default: the checkpoint's; of a shape bfloat16")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    p.add_argument(
        "--threads",
        type=int,
        help="a rank, at every point (default: its share of the cores; 1 with --prompts --exact)",
    )
    p.add_argument(
        "--out", type=Path, default=Path("scaling"), metavar="DIR", help="for results (default scaling)"
    )
    p.add_argument(
        "--redraw",
        type=Path,
        metavar="DIR",
        help="measure nothing: write report and plot of the results there anew",
    )
    add_watching(p)
    add_verbose(p)


@dataclass(frozen=True)
class Plan:
    """What the words ask for. ``subject``: the layer, or None for ``answers``, a request whose ``out`` is a folder."""

    name: str
    points: tuple[Point, ...]
    modes: tuple[str, ...]
    subject: LayerSource | None
    answers: Request | None
    per_rank: int


def plan(args: argparse.Namespace, node_of: tuple[int, ...]) -> Plan:
    """Raises ValueError, OSError for what cannot be, before any rank builds or writes anything."""
    for name, least in (
        ("tokens", 1),
        ("tokens_per_rank", 1),
        ("max_new_tokens", 1),
        ("batch", 1),
        ("threads", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: must be positive")
    points = points_of(node_of, numbers("--ranks", args.ranks), numbers("--nodes", args.nodes))
    subject = None if args.prompts else subject_of(args)
    answers = answers_of(args) if args.prompts else None
    return Plan(
        name=Path(args.what).name if subject is None else subject.name,
        points=tuple(points),
        modes=(args.only,) if args.only else MODES,
        subject=subject,
        answers=answers,
        per_rank=args.tokens_per_rank or max(1, args.tokens // points[0].ranks),
    )


def subject_of(args: argparse.Namespace) -> LayerSource:
    """The layer to measure."""
    options = LayerOptions(args.dispatcher, args.kernel, args.exact)
    if args.what in SHAPES:
        config = SHAPES[args.what].layer(args.scale)
        dtype = FLOATS[args.dtype or "bfloat16"]
        scaled = "" if args.scale == 1 else f" x {args.scale:g}"
        return ShapeLayer(f"{args.what}{scaled}", SyntheticLayer(config, dtype, args.seed), options)
    with _checkpoint(args.what) as checkpoint:
        layers = moe_layers(find(checkpoint.config), checkpoint.config)
        layer = layers[0] if args.layer is None else args.layer
        config = read_layer_config(checkpoint, layer)
        return CheckpointLayer(Path(args.what), layer, config.hidden_size, _dtype(args, checkpoint), options)


def answers_of(args: argparse.Namespace) -> Request:
    """The prompts to answer."""
    if args.exact and (args.batch or 1) > 1:
        raise ValueError(
            f"--exact --batch {args.batch}: sequences of one batch change each other's rounding; leave --batch out"
        )
    if args.tp not in (None, 1):
        raise ValueError(
            f"--tp {args.tp}: dense layers of whole models are not sliced; leave it out with --prompts"
        )
    with _checkpoint(args.what) as checkpoint:
        dtype = _dtype(args, checkpoint)
    return Request(
        checkpoint=Path(args.what),
        prompts=args.prompts,
        out=args.out / "answers",
        sampling=Sampling(0.0, 0, 1.0, args.seed),
        max_new_tokens=args.max_new_tokens,
        batch=args.batch or (1 if args.exact else BATCH),
        prefill_tokens=PREFILL_TOKENS,
        dtype=dtype,
        exact=args.exact,
    )


def check_files(args: argparse.Namespace) -> None:
    """On the rank that reads prompts and writes results: make the folder of the results."""
    if args.prompts and not args.prompts.is_file():
        raise ValueError(f"{args.prompts}: no such file; give a text file or a .jsonl as --prompts")
    result_folder.open_folder(args.out)
    if args.prompts:
        (args.out / "answers").mkdir(exist_ok=True)


def _checkpoint(what: str) -> Checkpoint:
    if not Path(what).exists():
        raise ValueError(f"{what!r} is neither a shape nor a directory; the shapes are {', '.join(SHAPES)}")
    return Checkpoint(Path(what))


def _dtype(args: argparse.Namespace, checkpoint: Checkpoint) -> torch.dtype:
    dtype = FLOATS[args.dtype] if args.dtype else checkpoint.dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype {dtype}: choose --dtype {', '.join(sorted(FLOATS))}")
    return dtype

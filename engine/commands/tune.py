"""``xpar tune``: search the tile shapes of the GPU kernels for one layer, on this machine, in under two minutes."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from xpar.comm.failure import AgreedError
from xpar.engine.architectures.layer_config import find, moe_layers
from xpar.engine.bench.kernels.cases import Layer
from xpar.engine.bench.kernels.options import require_gpu
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig
from xpar.engine.layer.build import FLOATS, read_layer_config
from xpar.engine.synthetic.shapes import SHAPES, shape_of

TOKENS = (1, 16, 64, 256, 1024, 4096)
CONFIGS = 60


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    p = subparsers.add_parser("tune", help="search tile shapes for a layer on this GPU (one process, no MPI)")
    p.add_argument("layer", metavar="SHAPE|DIR", help=f"a checkpoint, or one of {', '.join(SHAPES)}")
    p.add_argument("--layer", type=int, dest="index", help="MoE layer of the checkpoint (default: the first)")
    p.add_argument("--ep", type=int, default=1, help="expert-parallel ranks of the job: the GPU holds E / ep")
    p.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), help="that come to this GPU at once"
    )
    p.add_argument("--dtype", choices=sorted(FLOATS), default="bfloat16", help="default bfloat16")
    p.add_argument("--configs", type=int, default=CONFIGS, help=f"tried in all (default {CONFIGS})")
    p.add_argument("--seconds", type=float, default=110.0, help="try nothing new after this long")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    p.add_argument("--out", type=Path, default=Path("tiles.json"), help="table to write (default tiles.json)")
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Search, say what was gained, write the table."""
    begin = time.perf_counter()
    try:
        layer = _layer(args)
    except ValueError as error:
        raise AgreedError(str(error)) from None  # there is one process: shown as one line
    dtype = FLOATS[args.dtype]
    require_gpu(layer.spec(dtype))
    console = Console(highlight=False)
    _tune(args, layer, dtype, console, begin + args.seconds)
    console.print(f"{args.out}: written after {time.perf_counter() - begin:.0f} s", soft_wrap=True)
    return 0


def _layer(args: argparse.Namespace) -> Layer:
    """The layer that one GPU of the job computes; ValueError for one that there is not."""
    for name, least in (("ep", 1), ("configs", 1), ("tokens", 1)):
        value = min(args.tokens) if name == "tokens" else getattr(args, name)
        if value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    config = _config(args)
    if config.num_experts % args.ep:
        raise ValueError(
            f"--ep {args.ep}: must divide {config.num_experts} experts, so that all GPUs hold as many"
        )
    return Layer(
        args.layer,
        config.routed_size,
        config.intermediate_size,
        config.num_experts // args.ep,
        config.router.top_k,
        config.num_experts,
        config.activation,
    )


def _config(args: argparse.Namespace) -> LayerConfig:
    if not Path(args.layer).is_dir():
        if args.index is not None:
            raise ValueError(f"--layer {args.index}: {args.layer} is no checkpoint; leave --layer out")
        return shape_of(args.layer).layer()
    with Checkpoint(Path(args.layer)) as checkpoint:
        first = moe_layers(find(checkpoint.config), checkpoint.config)[0]
        return read_layer_config(checkpoint, first if args.index is None else args.index)


def _tune(
    args: argparse.Namespace, layer: Layer, dtype: torch.dtype, console: Console, deadline: float
) -> None:
    from xpar.engine.bench.kernels.cases import load, random_inputs, random_weights
    from xpar.engine.bench.kernels.tile_search import Cell, parts_of, search
    from xpar.kernels.gpu.experts import TritonExperts
    from xpar.kernels.gpu.tile_tables import Machine, Table, write_table

    g = torch.Generator("cuda").manual_seed(args.seed)
    kernel = TritonExperts(layer.spec(dtype))
    load(kernel, random_weights(kernel.spec, g))
    cells = [
        Cell(f"M={m}", kernel, random_inputs(kernel.spec, layer, m, g)) for m in sorted(set(args.tokens))
    ]
    each = max(1, args.configs // len(parts_of(cells)))

    def note(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    found = search(cells, each, note, deadline)
    write_table(args.out, Machine.of("cuda"), dtype, Table.from_dict(found["table"]))

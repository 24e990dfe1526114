"""``xpar tune``: search the tile shapes of the GPU kernels for one layer."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from xpar.comm.communicator import SoloCommunicator
from xpar.comm.failure import AgreedError
from xpar.engine.bench.kernels.cases import (
    LayerCase,
    load_experts,
    random_inputs,
    random_weights,
    require_gpu,
)
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.commands.options import at_least
from xpar.engine.config import LayerConfig
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.layer.build import FLOATS
from xpar.engine.layer.checkpoint_config import read_layer_config, read_layer_configs
from xpar.engine.synthetic.shapes import shape_of


def main(args: argparse.Namespace) -> int:
    """Search, print what was gained, and write the table."""
    begin = time.perf_counter()
    try:
        layer = _read_layer(args)
    except ValueError as error:
        raise AgreedError(str(error)) from None  # there is one process: shown as one line
    dtype = FLOATS[args.dtype]
    require_gpu(layer.spec(dtype))
    console = Console(highlight=False)
    _search_and_write(args, layer, dtype, console, begin + args.seconds)
    console.print(f"{args.out}: written after {time.perf_counter() - begin:.0f} s", soft_wrap=True)
    return 0


def _read_layer(args: argparse.Namespace) -> LayerCase:
    """Return the layer as one GPU of the job has it; raise ValueError if there is none."""
    at_least(ep=(args.ep, 1), configs=(args.configs, 1), tokens=(min(args.tokens), 1))
    config = _read_config(args)
    if config.num_experts % args.ep:
        raise ValueError(
            f"--ep {args.ep}: must divide {config.num_experts} experts, so that all GPUs hold as many"
        )
    return LayerCase(
        args.layer,
        config.routed_size,
        config.intermediate_size,
        config.num_experts // args.ep,
        config.router.top_k,
        config.num_experts,
        config.activation,
    )


def _read_config(args: argparse.Namespace) -> LayerConfig:
    """Read the layer's configuration from a checkpoint, or from the table of shapes."""
    folder = find_checkpoint(SoloCommunicator(), Path(args.layer))
    if not folder.is_dir():
        if args.index is not None:
            raise ValueError(f"--layer {args.index}: {args.layer} is no checkpoint; leave --layer out")
        return shape_of(args.layer).layer()
    with open_checkpoint(folder) as checkpoint:
        first = next(iter(read_layer_configs(checkpoint)))
        return read_layer_config(checkpoint, first if args.index is None else args.index)


def _search_and_write(
    args: argparse.Namespace, layer: LayerCase, dtype: torch.dtype, console: Console, deadline: float
) -> None:
    """Search a tile table until ``deadline`` of ``time.perf_counter()``, and write it to ``args.out``."""
    # Triton is an optional package.
    from xpar.engine.bench.kernels.tile_search import Cell, group_by_part, search
    from xpar.kernels.gpu.experts import TritonExperts
    from xpar.kernels.gpu.tile_tables import Machine, Table, write_table

    generator = torch.Generator("cuda").manual_seed(args.seed)
    kernel = TritonExperts(layer.spec(dtype))
    load_experts(kernel, random_weights(kernel.spec, generator))
    cells = [
        Cell(f"M={tokens}", kernel, random_inputs(kernel.spec, layer, tokens, generator))
        for tokens in sorted(set(args.tokens))
    ]
    values_per_part = max(1, args.configs // len(group_by_part(cells)))

    def note(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    found = search(cells, values_per_part, note, deadline)
    write_table(args.out, Machine.of("cuda"), dtype, Table.from_dict(found["table"]))

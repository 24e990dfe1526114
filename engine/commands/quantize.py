"""``xpar quantize``: write a checkpoint in floats again with quantised weights."""

import argparse
import time

from rich.console import Console

from xpar.comm.communicator import SoloCommunicator
from xpar.comm.failure import AgreedError
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation
from xpar.engine.models.quantise_checkpoint import quantise_checkpoint


def main(args: argparse.Namespace) -> int:
    """Write the checkpoint; print the error of each layer, the sizes and the time."""
    dense = args.format if args.dense == "same" else args.dense
    begin = time.monotonic()
    try:
        checkpoint = find_checkpoint(SoloCommunicator(), args.checkpoint)
        written = quantise_checkpoint(checkpoint, args.out, Quantisation(args.format, dense))
    except (ValueError, OSError) as error:
        raise AgreedError(str(error)) from None  # there is one process: shown as one line
    console = Console(highlight=False)
    for layer, lost in written.layer_errors.items():
        where = f"layer {layer}" if layer >= 0 else "outside of layers"
        console.print(f"{where}: relative error {lost:.2e}")
    console.print(
        f"{args.out}: {written.bytes_after / 1e6:.1f} MB instead of {written.bytes_before / 1e6:.1f}, "
        f"relative error {written.error:.2e}, in {time.monotonic() - begin:.1f} s",
        soft_wrap=True,
    )
    return 0

"""The `xpar` sub-commands, one module each: ``register(subparsers)`` adds it, ``main(args)`` runs it."""

from xpar.engine.commands import bench, doctor, make_checkpoint, run, tune

COMMANDS = (run, bench, tune, make_checkpoint, doctor)

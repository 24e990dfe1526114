"""The `xpar` sub-commands, one module each: ``register(subparsers)`` adds it, ``main(args)`` runs it."""

from xpar.engine.commands import bench, doctor, generate, make_checkpoint, run, tune

COMMANDS = (run, generate, bench, tune, make_checkpoint, doctor)

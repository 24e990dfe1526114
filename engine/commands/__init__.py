"""The `xpar` sub-commands, one module each: ``register(subparsers)`` adds it, ``main(args)`` runs it."""

from xpar.engine.commands import bench, doctor, evaluate, generate, make_checkpoint, run, score, tune

COMMANDS = (run, generate, score, evaluate, bench, tune, make_checkpoint, doctor)

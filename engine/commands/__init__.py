"""The `xpar` sub-commands, one module each: ``register(subparsers)`` adds it, ``main(args)`` runs it."""

from xpar.engine.commands import doctor, make_checkpoint, run

COMMANDS = (run, make_checkpoint, doctor)

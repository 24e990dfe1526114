"""The sub-commands of ``xpar``: reading options and printing results.

Only :mod:`xpar.engine.cli` imports this room.

``parsers.py``, ``model_parsers.py`` and ``bench_parsers.py`` have the options of every command and import
nothing that takes long. A command's own module has ``main(args)``, which returns the exit status; it is
imported when the command is chosen.
"""

"""Deadlines for collectives, and one report when a deadline passes or a rank fails.

README.md explains the states of a rank, the time line of a death and the threads. This room imports nothing
of ``xpar.comm`` but ``partition``.
"""

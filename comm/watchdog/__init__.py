"""Deadlines for collectives, and one report of where every rank is when a deadline passes or a rank fails.

README.md explains the states of a rank, the time line of a death and the threads. This room imports nothing else of
``xpar.comm`` but ``partition``.
"""

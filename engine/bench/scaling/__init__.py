"""Scaling studies: one measurement of a layer or a model on more and more ranks of a job.

A point is the first n ranks of the job. The strong mode has the same work at every point, the weak mode the
same work per rank.
"""

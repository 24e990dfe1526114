"""One mixture-of-experts layer on the ranks of a job: route, plan, dispatch, compute, combine, finish.

Start reading at :mod:`xpar.engine.layer.runner`. Letters: T tokens of a rank, H hidden size, I width of an
expert, E experts, k experts of a token, R ranks of the expert group.
"""

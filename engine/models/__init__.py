"""Whole models: transformers' own code around xpar's expert layers, loaded piece by piece on every rank.

Start reading at :mod:`xpar.engine.models.loader`. Letters: B rows of a batch, S columns, T
tokens, H hidden size, k experts of a token.
"""

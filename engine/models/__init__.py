"""Whole models: transformers' own code around xpar's expert layers, loaded piece by piece on every rank.

B rows of a batch, S columns, T tokens, H hidden size, k experts of a token.
"""

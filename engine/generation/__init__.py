"""Generation: prompts in, answers out.

Start reading at :mod:`xpar.engine.generation.generate`. Letters: B sequences or texts of a
batch, S columns, V vocabulary, H hidden size.
"""

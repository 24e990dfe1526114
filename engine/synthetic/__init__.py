"""Made-up layers, checkpoints, tokenizers and tokens, for tests and benchmarks.

Letters in shapes: T tokens, H hidden size, I width of an expert, E experts, k experts per token.
"""

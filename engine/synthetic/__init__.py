"""Made-up layers, checkpoints, tokenizers and tokens with random values, for tests, demonstrations and benchmarks.

Letters in shapes: T tokens, H hidden size, I width of an expert, E experts, k experts per token.
"""

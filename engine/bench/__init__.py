"""The measurements behind ``xpar bench``.

Every figure stands beside its peer, from one run, and is checked.

Letters in shapes: T tokens, H hidden size, I width of an expert, E experts, k experts per token, B sequences
of the whole job, P tokens per prompt, V vocabulary.
"""

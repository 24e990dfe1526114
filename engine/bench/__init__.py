"""The measurements behind ``xpar bench``.

Every figure stands beside that of a peer (transformers, torch, or a bare MPI call of the same rows), from one
run, and outputs are compared.

Letters in shapes: T tokens, H hidden size, I width of an expert, E experts, k experts per token, B sequences
of the whole job, P tokens per prompt, V vocabulary.
"""

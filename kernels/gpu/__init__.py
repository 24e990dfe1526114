"""Expert kernels, routing and row moving on GPUs, in Triton.

Without Triton ``availability``, ``tile_tables``, ``default_tables``, ``code_tables`` and ``limits`` can be
imported, and no other file.
"""

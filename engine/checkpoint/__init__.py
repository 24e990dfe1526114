"""The files of a checkpoint: tensors are read by byte range and written in shards.

Nothing in this room depends on a model family.
"""

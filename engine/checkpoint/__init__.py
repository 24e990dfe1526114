"""Tensors in the files of a checkpoint, read by ranges and written in shards. Knows no model family."""

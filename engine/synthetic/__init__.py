"""Layers, checkpoints and tokenizers that are made up: random weights in the real formats, for tests and benchmarks."""

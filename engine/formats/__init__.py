"""Quantised checkpoints: every format that xpar reads, as float tensors, and as codes and scales.

One file for each format says how it stores a weight. A module is quantised if the file has its scales or its
packed codes; what config.json lists as left out is only compared with that. Letters in shapes: N outputs and
K inputs of a weight [N, K], G groups along K, E experts.
"""

"""Checks and timing of one GPU's expert kernels, against float64, peers and limits; tile shapes."""

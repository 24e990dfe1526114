"""Checks and times the expert kernels of one GPU: against float64, against its peers, against its own ceilings."""

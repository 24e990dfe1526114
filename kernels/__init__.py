"""Arithmetic and row moving on one device. Knows no rank, no group, no checkpoint."""

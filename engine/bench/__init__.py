"""Measurements behind ``xpar bench``: every figure beside what it is compared with, from one run, and checked."""

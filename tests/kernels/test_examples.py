"""The examples in the docstrings of everything that ``xpar.kernels`` exports, run as they stand."""

import doctest
import sys
from inspect import isclass, isfunction

import pytest
import torch

import xpar.kernels

EXPORTED = {name: getattr(xpar.kernels, name) for name in xpar.kernels.__all__}
DOCUMENTED = sorted(name for name, value in EXPORTED.items() if isclass(value) or isfunction(value))
# The public entries, which must have an example; the others may have one.
ENTRIES = {
    "Activation",
    "Attention",
    "activate",
    "choose_kernel",
    "choose_linear",
    "group_by_expert",
    "mlp",
    "stable_topk",
    "weighted_sum",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_give_what_they_show(name):
    """After ``import torch`` and ``from xpar.kernels import *``."""
    names = {"torch": torch, **EXPORTED}
    found = doctest.DocTestFinder(recurse=False).find(EXPORTED[name], name, globs=names)
    assert EXPORTED[name].__doc__
    assert any(test.examples for test in found) or name not in ENTRIES
    for test in found:
        assert doctest.DocTestRunner().run(test, out=sys.stdout.write).failed == 0

"""The one compiled part; all else about the package is in setup.cfg."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        # No Python in it: loaded with ctypes. Its OpenMP is the one that torch brings, so that both share
        # their threads: linking with -fopenmp would bring a second one.
        Extension(
            "xpar.kernels.cpu._native",
            ["kernels/cpu/native.c", "kernels/cpu/native_paged.c", "kernels/cpu/native_quantised.c"],
            depends=[str(path) for path in Path("kernels/cpu").glob("native_*.h")],
            extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast"],
            # Without a compiler xpar installs all the same, and `xpar doctor` says what is missing.
            optional=True,
        )
    ]
)

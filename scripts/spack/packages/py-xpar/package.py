# Spack recipe:   spack repo add scripts/spack && spack dev-build -d . py-xpar@0.1.0 ^mpich
# (in the root of a checkout, which dev-build installs)
from spack.package import *


class PyXpar(PythonPackage):
    """MPI-native expert-parallel engine for mixture-of-experts models."""

    license("Apache-2.0")
    version("0.1.0")

    variant("cuda", default=False, description="Kernels and NCCL transport for NVIDIA GPUs")
    variant("hf", default=True, description="Tokenizers and configurations, for xpar generate")
    variant("plot", default=False, description="Plots of scaling sweeps")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("mpi", type=("build", "run"))
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-rich@13:", type=("build", "run"))
    depends_on("py-safetensors@0.4:", type=("build", "run"))
    depends_on("py-torch@2.11:", type=("build", "run"))
    depends_on("py-torch+cuda", when="+cuda", type=("build", "run"))
    depends_on("py-triton@3.6:", when="+cuda", type=("build", "run"))
    depends_on("nccl@2.23:", when="+cuda", type="run")
    depends_on("py-transformers@5.17:", when="+hf", type=("build", "run"))
    depends_on("py-matplotlib@3.8:", when="+plot", type=("build", "run"))

    import_modules = ("xpar.engine", "xpar.comm", "xpar.kernels")

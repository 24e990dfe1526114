-- Environment module (Lmod) of an xpar that was installed into a virtual environment:
--   python3 -m venv /apps/xpar/0.1.0 && /apps/xpar/0.1.0/bin/pip install 'xpar[hf,plot] @ file:///path/to/checkout'
-- Copy to MODULEPATH/xpar/0.1.0.lua and change the two lines marked EDIT.
help([[xpar runs the mixture-of-experts layers of Hugging Face checkpoints expert-parallel under MPI.
Start with `xpar doctor`, inside an allocation and under the launcher of the site.]])
whatis("Name: xpar")
whatis("Description: MPI-native expert-parallel engine for mixture-of-experts models")

local root = pathJoin("/apps/xpar", myModuleVersion()) -- EDIT: where it was installed
depends_on("cray-mpich")                               -- EDIT: the MPI that mpi4py loads; none with xpar[mpich]
-- setenv("MPI4PY_LIBMPI", "/path/to/libmpi.so")       -- where the loader would find another one first

conflict("xpar")
prepend_path("PATH", pathJoin(root, "bin"))
unsetenv("PYTHONHOME")

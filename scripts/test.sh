#!/usr/bin/env bash
# Set up, then run every check and every test: lint, types, serial tests, the tests marked `mpi` on 1 to 4 ranks and on
# several nodes as MPI sees them, a few of them on Open MPI, and the batch scripts on a Slurm cluster of this machine's
# own.
#
#   ./scripts/test.sh [--quick]     --quick: serial tests and 2 ranks only
#   TEST_SECONDS=3600 ./scripts/test.sh     after that many seconds (2400) all that still runs is ended
#
# Every part runs even if one before it failed. The last line is `N passed, N failed, N skipped` over all parts, where
# each check counts as one, and a run that ended without a summary (killed, crashed, past its limit) as one failure.
# The cluster needs Slurm and munge, which are installed where the user is root and apt works; where they cannot be, the
# report says so and counts it as one skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sizes="2 3 4" quick=
case "${1:-}" in
  "") ;;
  --quick) sizes=2 quick=yes ;;
  *) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit 2 ;;
esac

log=$(mktemp -d) beside='' slurm='' openmpi=''
trap 'kill $beside $slurm $openmpi 2>/dev/null || true; rm -rf "$log"' EXIT
# What other parts need comes while this one waits for the network, or keeps one core busy.
if [ -z "$quick" ]; then
  timeout 300 ./scripts/slurm/local_cluster.sh install </dev/null >"$log/slurm" 2>&1 & slurm=$!
fi
./scripts/setup.sh
. scripts/environment.sh
# There are more ranks and threads than cores: one that waits sleeps, where it would keep the others from working.
export MPIR_CVAR_ENABLE_HEAVY_YIELD=1 OMP_WAIT_POLICY=passive

passed=0 failed=0 skipped=0 report=
limit=$((SECONDS + ${TEST_SECONDS:-2400}))

note() { # note NAME SECONDS STATUS RESULT
  report+=$(printf '%-15s %5d s  %-7s  %s' "$1" "$2" "$3" "$4")$'\n'
}

check() { # check NAME COMMAND...: one verdict from an exit status
  local name=$1 start=$SECONDS status=ok
  shift
  echo "== $name"
  if "$@" </dev/null; then passed=$((passed + 1)); else failed=$((failed + 1)) status=FAILED; fi
  note "$name" $((SECONDS - start)) $status ""
}

count() { # count FILE WORD: the number before WORD in pytest's last summary, 0 if it is not there; Open MPI's version ends in NUL
  { grep -aE '^=+ .* in [0-9.]+s' "$1" | tail -n 1 | grep -Eo "[0-9]+ $2" || echo 0; } | cut -d' ' -f1
}

limited() { # limited COMMAND...: as one process, so that a signal to it reaches the command's
  exec timeout --kill-after=10 $((limit > SECONDS ? limit - SECONDS : 1)) "$@" </dev/null 2>&1
}

verdicts() { # verdicts NAME SECONDS CODE FILE: as many as pytest gave in FILE before it ended with CODE
  local status=ok good bad left_out
  good=$(count "$4" passed) bad=$(($(count "$4" failed) + $(count "$4" 'errors?'))) left_out=$(count "$4" skipped)
  if [ "$3" -ne 0 ] && [ "$bad" -eq 0 ]; then bad=1; fi
  if [ "$bad" -gt 0 ]; then status=FAILED; fi
  if [ "$3" -eq 124 ] || [ "$3" -eq 137 ]; then status=LATE; fi
  passed=$((passed + good)) failed=$((failed + bad)) skipped=$((skipped + left_out))
  note "$1" "$2" $status "$good passed, $bad failed, $left_out skipped"
}

tests() { # tests NAME COMMAND...
  local name=$1 start=$SECONDS code=0
  shift
  echo "== $name"
  (limited "$@") | tee "$log/tests" || code=${PIPESTATUS[0]}
  verdicts "$name" $((SECONDS - start)) "$code" "$log/tests"
}

begin() { # begin COMMAND...: tests beside what follows, until `finish`
  begun=$EPOCHSECONDS
  limited "$@" >"$log/beside" & beside=$!
}

finish() { # finish NAME: show what the tests begun had to say, and count their verdicts
  local code=0
  wait "$beside" || code=$?
  beside=''
  echo "== $1"
  cat "$log/beside"
  verdicts "$1" $(($(stat -c %Y "$log/beside") - begun)) "$code" "$log/beside"
}

# One thread a rank: four ranks on two cores are slow enough without eight threads.
export OMP_NUM_THREADS=1
ranks=(python -m mpi4py -m pytest --color=no --with-mpi -p no:cacheprovider)
# A single rank leaves a core to the checks.
if [ -z "$quick" ]; then
  ./scripts/openmpi.sh </dev/null >"$log/openmpi" 2>&1 & openmpi=$!
  begin mpirun -n 1 "${ranks[@]}"
fi
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check mypy mypy
# Two at a time: most of these wait for processes of their own. Of the ways to deal tests out, those by file wait for
# ever once a test has ended its worker.
tests serial python -m pytest --color=no --durations=5 -n 2 --dist worksteal --ignore=tests/cluster
if [ -z "$quick" ]; then finish "mpi, n = 1"; fi
# In two jobs: an MPI process has 2048 communicators, and many tests make grids of their own that live as long as it.
for n in $sizes; do
  tests "mpi, n = $n" mpirun -n "$n" "${ranks[@]}" --ignore=tests/engine/layer
  tests "layers, n = $n" mpirun -n "$n" "${ranks[@]}" tests/engine/layer
done

on_nodes() { # on_nodes NAME HOSTS RANKS FILES...: HOSTS as a:2,b:1, two ranks on a node and one on another
  tests "$1" mpirun -hosts "$2" -n "$3" "${ranks[@]}" "${@:4}"
}

if [ -z "$quick" ]; then
  on_nodes "2 + 1 ranks" a:2,b:1 3 tests/comm tests/engine/bench/test_scaling_mpi.py
  on_nodes "1 + 2 + 1 ranks" a:1,b:2,c:1 4 tests/comm/test_nodes_mpi.py tests/comm/dispatch/test_every_dispatcher_mpi.py \
    tests/engine/layer/test_any_layer_mpi.py
  # Ranks 0, 2 on one node and 1, 3 on the other.
  MPIR_CVAR_NUM_CLIQUES=2 on_nodes "2 + 2 in turn" a:4 4 tests/comm/test_nodes_mpi.py
  if wait "$openmpi"; then
    openmpi=''
    other=$PWD/.venv-openmpi
    MPI4PY_LIBMPI=$other/lib/libmpi.so.40 tests "Open MPI, faults" \
      python -m pytest --color=no -n 2 tests/comm/watchdog/test_failure.py tests/comm/watchdog/test_deaths.py \
      tests/engine/generation/test_full_disk.py tests/engine/commands/test_generate_command.py \
      -k "exception or exit or thread or skips or stopped or killed or crash or shapes or told or sigterm or full_disk or vanishes"
    # As its own environment variables say it: on more ranks than cores, and in a container as root.
    MPI4PY_LIBMPI=$other/lib/libmpi.so.40 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
      PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_rmaps_default_binding_policy=none \
      tests "Open MPI, n = 3" "$other/bin/mpirun" -n 3 "${ranks[@]}" \
      tests/comm/watchdog/test_watchdog_mpi.py tests/comm/test_communicator_mpi.py
  else
    skipped=$((skipped + 1))
    note "Open MPI" 0 "NOT RUN" "$(tail -n 1 "$log/openmpi")"
  fi
  if wait "$slurm"; then
    slurm=''
    tests cluster python -m pytest --color=no --durations=5 tests/cluster
  else
    skipped=$((skipped + 1))
    note cluster 0 "NOT RUN" "$(tail -n 1 "$log/slurm")"
  fi
fi

printf '\n%s\n' "$report"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]

#!/bin/bash
# Run the MoE layers of a checkpoint on all ranks of a Flux allocation. Options after the checkpoint go to `xpar run`.
#
#   flux batch --nodes=2 scripts/flux/run.flux CHECKPOINT --tokens 65536 --verify
#
# Change the lines marked EDIT, or say the same on the command line, which wins.
#flux: --job-name=xpar-run
#flux: --nodes=2
#flux: --exclusive
#flux: --time-limit=10m
#flux: --output={{name}}-{{id}}.out

set -euo pipefail
checkpoint=${1:?usage: flux batch run.flux CHECKPOINT [options of xpar run]}

# ---- EDIT: ranks a node and cores a rank: one rank a GPU; on CPU nodes one a NUMA domain ---
ranks=${RANKS_PER_NODE:-4} cpus=${CPUS_PER_TASK:-16}
nodes=$(flux resource list --states=free --no-header --format={nnodes})

# ---- EDIT: where xpar is: nothing to do if it was on PATH where you called flux ---
xpar=(xpar)
if [ -n "${IMAGE:-}" ]; then xpar=(apptainer exec --nv --bind "$PWD" "$IMAGE" xpar); fi

export OMP_NUM_THREADS=$cpus
unset OMP_PROC_BIND OMP_PLACES  # they bind Python itself to the first core of its rank, and every thread but OpenMP's
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # scripts/slurm/run.sbatch explains the other NCCL variables
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}
launch=(flux run --nodes="$nodes" --tasks-per-node="$ranks" --exclusive
  -o cpu-affinity=per-task     # a rank keeps its share of the cores
  -o gpu-affinity=off          # and sees all GPUs of its node; xpar picks one a rank
  -o exit-on-error             # one rank's death ends all
  -o exit-timeout=30s)         # so does one rank's early leave, after 30 s
# MPICH and Cray MPICH find Flux by its PMI; for Open MPI add: -o pmi=pmix

# A launch that cannot work stops here, in seconds.
"${launch[@]}" "${xpar[@]}" doctor ||
  { echo "job stopped: xpar doctor could not start, or found the problem above" >&2; exit 1; }
"${launch[@]}" "${xpar[@]}" run "$checkpoint" "${@:2}"

#!/usr/bin/env bash
# Write a small OLMoE checkpoint with random weights and run its MoE layers on two MPI ranks, checked against the
# fp32 reference. Arguments go to `xpar run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
. scripts/environment.sh

rm -rf demo-checkpoint
xpar make-checkpoint olmoe demo-checkpoint --layers 2 --experts 8 --hidden 256 --intermediate 128 --top-k 2
mpirun -n 2 xpar run demo-checkpoint --tokens 512 --verify "$@"

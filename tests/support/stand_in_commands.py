"""Commands that stand in for ``xpar`` in batch jobs, where a test is about the job and not about what it
computes."""

import sys
from pathlib import Path

from slurm import venv_path

XPAR = Path(sys.executable).parent / "xpar"
# Answers the prompts by copying them, one at its start and the others after `xpar run`, which takes for ever
# the first time in a file called slow*: a command of the same form as `xpar generate`.
ANSWERING = f"""#!/bin/bash
[ "$1" = generate ] || exec {XPAR} "$@"
checkpoint=$2 prompts=$4 out=$6 steps=1
[ "$3 $5 $7" = "--prompts --out --resume" ] || exit 2
if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && [[ $prompts == */slow* ]]; then steps=1000000; fi
if [ "$SLURM_PROCID" = 0 ]; then head -n 1 "$prompts" >"$out"; fi
{XPAR} run "$checkpoint" --tokens 8 --steps $steps || exit
if [ "$SLURM_PROCID" = 0 ]; then cat "$prompts" >"$out"; fi
"""
# Says what it is told and what it may use, fails where its name is in $FAILING, and hangs in $HANGING.
ECHOING = """#!/bin/bash
cores=$(taskset -pc $$ | sed 's/.*: //')
echo "rank $SLURM_PROCID of $SLURM_NTASKS: GPUs ${CUDA_VISIBLE_DEVICES:-none}; cores $cores; $*"
if [ "$1" = "${HANGING:-}" ]; then sleep 1000; fi
if [[ " $FAILING " == *" $1 "* ]]; then exit 5; fi
while [ $# -gt 0 ]; do
  if [ "$1" = --json ]; then echo '{}' >"$2"; fi
  if [ "$1" = --out ] && [ -d "$2" ]; then echo '{}' >"$2/scaling.jsonl"; fi
  shift
done
"""
# Where a test has seen the doctor elsewhere.
NO_DOCTOR = f"""#!/bin/bash
[ "$1" = doctor ] || exec {XPAR} "$@"
"""


def stand_in(directory: Path, source: str) -> str:
    """A PATH on which ``xpar`` is ``source``."""
    command = directory / "bin" / "xpar"
    command.parent.mkdir(exist_ok=True)
    command.write_text(source)
    command.chmod(0o755)
    return venv_path(command.parent)

#!/usr/bin/env bash
# A throw-away Slurm cluster on this machine: munge, slurmctld and one slurmd per node, all listening on loopback only,
# without systemd, accounting or cgroups. Everything it writes lies in DIR; nothing under /etc is read or changed.
#
#   scripts/slurm/local_cluster.sh start [DIR]     NODES=2 CPUS=2 GPUS=0: nodes, and cores and (fake) GPUs a node;
#                                                  BIND=yes: ranks are bound to cores, which the machine must have
#   scripts/slurm/local_cluster.sh stop [DIR]      ends its jobs and daemons and removes DIR
#   scripts/slurm/local_cluster.sh install         installs the Debian packages it needs (root, apt)
#
# `start` prints the line that makes sbatch, srun, squeue … of this shell talk to it:
#
#   eval "$(scripts/slurm/local_cluster.sh start)"
#
# DIR is /tmp/xpar-slurm-UID unless given. Started again, it answers the same and changes nothing. As root every node
# has a host name (n1, n2, …) and a /dev/shm of its own; for other users the nodes share the machine's.
set -euo pipefail

packages="slurmctld slurmd slurm-client munge"
pmix=libpmix-dev  # what `srun --mpi=pmix` opens, for Open MPI; a cluster starts without it
commands="munged slurmctld slurmd srun sbatch scontrol sinfo"
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "local_cluster: $*" >&2; exit 1; }

missing() { # those of $commands that are not there
  local name
  for name in $commands; do command -v "$name" >/dev/null || printf '%s ' "$name"; done
}

has_pmix() { compgen -G '/usr/lib*/*/pmix2/lib/libpmix.so' >/dev/null; }

cannot_install() { # why not, in words
  command -v apt-get >/dev/null || { echo "no apt-get here; install Slurm and munge by the machine's own means"; return; }
  [ "$(id -u)" = 0 ] || { echo "installing needs root: sudo apt-get install $packages $pmix"; return; }
  # The packages start system-wide daemons where systemd runs; that is not for a test to decide.
  [ ! -d /run/systemd/system ] || echo "install by hand, apt would start daemons: apt-get install $packages $pmix"
}

install_packages() {
  local reason
  reason=$(cannot_install)
  if [ -z "$(missing)" ] && { has_pmix || [ "$reason" ]; }; then return; fi
  [ -z "$reason" ] || fail "$reason"
  local log patience=(-o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o DPkg::Lock::Timeout=60)
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
  # shellcheck disable=SC2086 # a list of words
  add() { apt-get "${patience[@]}" install -y -q --no-install-recommends $packages $pmix >>"$log" 2>&1; }
  if add || { apt-get "${patience[@]}" update -q >>"$log" 2>&1 && add; }; then rm -f "$log"; return; fi
  tail -n 5 "$log" >&2
  rm -f "$log"
  [ -z "$(missing)" ] || fail "apt-get could not install $packages $pmix"
}

free_ports() { # the first of $1 consecutive ports below those that the kernel hands out
  python3 - "$1" <<'PY'
import contextlib, random, socket, sys
for first in random.sample(range(20000, 32000, 16), 500):
    with contextlib.ExitStack() as held, contextlib.suppress(OSError):
        for port in range(first, first + int(sys.argv[1])):
            held.enter_context(socket.socket()).bind(("127.0.0.1", port))
        print(first)
        sys.exit()
sys.exit("no free ports")
PY
}

processes() { # daemons, which carry a mark in their environment, what they started for jobs, and the jobs' processes
  local file
  {
    grep -lszxF "XPAR_LOCAL_CLUSTER=$dir" /proc/[0-9]*/environ || true
    for file in $(grep -lszxF "SLURM_CONF=$dir/slurm.conf" /proc/[0-9]*/environ); do
      if grep -qsx slurmstepd "${file%environ}comm"; then echo "$file"; else grep -lszE '^SLURM_JOB_ID=' "$file" || true; fi
    done
  } | cut -d/ -f3 | sort -u
}

slurm() { SLURM_CONF=$dir/slurm.conf timeout 5 "$@"; }  # ask this cluster

stop() {
  local signal pids _
  [[ ! -e $dir || -f $dir/.xpar-local-cluster || -z $(ls -A "$dir") ]] || fail "$dir is not a cluster's directory"
  if [ -f "$dir/started" ] && [ -n "$(processes)" ]; then
    slurm scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 30); do
      if [ -z "$(slurm squeue --noheader 2>/dev/null)" ]; then break; fi
      sleep 0.1
    done
  fi
  for signal in TERM KILL; do
    for _ in $(seq 30); do
      pids=$(processes)
      if [ -z "$pids" ]; then rm -rf "$dir"; return; fi
      # shellcheck disable=SC2086 # a list of words
      kill -s $signal $pids 2>/dev/null || true
      sleep 0.1
    done
  done
  fail "these processes do not end: $pids"
}

write_configuration() { # write_configuration FIRST_PORT OWN_NAMES
  local host
  host=$(hostname -s)
  { cat /etc/hosts; for i in $(seq "$nodes"); do echo "127.0.0.1 n$i"; done; } >"$dir/hosts"
  # Each node counts its cores from 0: bound ranks of different nodes share the machine's first ones, and are slow.
  # The reserved job numbers differ from cluster to cluster: MPICH names files in /dev/shm after them, and one left
  # by a job of the same number and another size would stop MPI_Init.
  # cred_expire is also how long a requeued job waits before it may start again (120 s unless said).
  cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n/spool
TmpFS=$dir/%n/tmp
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n/pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/%n
FirstJobId=$((RANDOM * 1000 + 1))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/$([ "$bind" ] && echo affinity || echo none)
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
$([ "$gpus" -eq 0 ] || echo GresTypes=gpu)
NodeName=n[1-$nodes] NodeHostname=$([ "$2" ] && echo "n[1-$nodes]" || echo "$host") NodeAddr=127.0.0.1 \
  Port=[$(($1 + 1))-$(($1 + nodes))] Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=4000 \
  $([ "$gpus" -eq 0 ] || echo "Gres=gpu:$gpus") State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  if [ "$gpus" -gt 0 ]; then
    for g in $(seq 0 $((gpus - 1))); do ln -s /dev/null "$dir/gpu$g"; done  # they must be character devices
    echo "Name=gpu File=$dir/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
  fi
}

daemon() { XPAR_LOCAL_CLUSTER=$dir SLURM_CONF=$dir/slurm.conf "$@" </dev/null; }  # marked, see processes

start_munge() {
  mkdir -m 700 "$dir/munge"
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
  chmod 711 "$dir/munge"
  daemon munged --force --num-threads=2 --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
    --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>"$dir/log/munged" ||
    fail "munged did not start: $(tail -n 1 "$dir/log/munged")"
}

start_node() { # start_node NAME OWN_NAMES
  mkdir -p "$dir/$1/spool" "$dir/$1/tmp"
  if [ -z "$2" ]; then daemon slurmd -N "$1"; return; fi
  daemon unshare --uts --mount bash -c 'mount --bind "$1/hosts" /etc/hosts && mount -t tmpfs -o size=2g tmpfs /dev/shm &&
    hostname "$2" && exec slurmd -N "$2"' - "$dir" "$1"
}

all_idle() { [ "$(slurm sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$nodes" ]; }

start() {
  local own_names= _
  if [ -f "$dir/started" ] && slurm scontrol ping >/dev/null 2>&1; then
    cat "$dir/started"
    return
  fi
  [ -z "$(missing)" ] || fail "not installed: $(missing)(Debian: apt-get install $packages $pmix, or $0 install)"
  if [ "$(id -u)" = 0 ] && unshare --uts --mount true 2>/dev/null; then own_names=yes; fi
  stop  # what a killed one left
  mkdir -p "$dir/log" "$dir/state"
  touch "$dir/.xpar-local-cluster"  # what `stop` may remove
  trap stop EXIT
  write_configuration "$(free_ports $((nodes + 1)))" "$own_names"
  start_munge
  daemon slurmctld -c || fail "slurmctld did not start: $(tail -n 1 "$dir/log/slurmctld")"
  for i in $(seq "$nodes"); do
    start_node "n$i" "$own_names" || fail "slurmd did not start: $(tail -n 1 "$dir/log/n$i")"
  done
  for _ in $(seq 100); do
    if all_idle; then
      trap - EXIT
      echo "export SLURM_CONF=$dir/slurm.conf" | tee "$dir/started"
      return
    fi
    sleep 0.1
  done
  tail -n 3 "$dir"/log/* >&2
  fail "the nodes did not come up"
}

nodes=${NODES:-2} cpus=${CPUS:-2} gpus=${GPUS:-0} bind=${BIND:-}
dir=$(realpath -m "${2:-/tmp/xpar-slurm-$(id -u)}")
case "${1:-}" in
  start) start ;;
  stop) stop ;;
  install) install_packages ;;
  *) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2; exit 2 ;;
esac

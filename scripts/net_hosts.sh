#!/usr/bin/env bash
# Run a command under mpirun on hosts that this machine pretends to be, with a network of a given speed between them:
# what a dispatcher saves between nodes, measured without a cluster.
#
#   ./scripts/net_hosts.sh HOSTS RANKS RATE COMMAND...
#   ./scripts/net_hosts.sh 2 2 1gbit python -m mpi4py -m xpar.engine bench comm --megabytes 1 --threads 1
#
# HOSTS hosts of RANKS ranks each; RATE as tc takes it. Every host has a network namespace, a name and a /dev/shm of its
# own; between them MPI has TCP alone. Needs root, iproute2 and MPICH (.[mpich] of setup.sh); all of it is gone afterwards.
set -euo pipefail

if [ $# -lt 4 ]; then sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit 2; fi
hosts=$1 ranks=$2 rate=$3
shift 3
for tool in ip tc unshare mpirun; do
  command -v $tool >/dev/null || { echo "$0: $tool not found; iproute2 and util-linux bring ip, tc and unshare" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "$0: needs root, to make network namespaces" >&2; exit 1; }

name=xpar$$ # namespaces are known to the whole machine
made=$(mktemp -d)
names=$(seq -f "$name-%g" "$hosts")

cleanup() {
  for host in $names "$name"; do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
    ip netns delete "$host" 2>/dev/null || true
    rm -rf "/etc/netns/$host"
  done
  rmdir /etc/netns 2>/dev/null || true
  rm -rf "$made"
}
trap cleanup EXIT

ip netns add "$name"
ip -n "$name" link add switch type bridge
ip -n "$name" link set switch up
i=0
for host in $names; do
  i=$((i + 1))
  ip netns add "$host"
  ip link add wire netns "$host" type veth peer name "port$i" netns "$name"
  ip -n "$name" link set "port$i" master switch up
  ip -n "$host" address add "10.77.0.$i/24" dev wire
  ip -n "$host" link set wire up
  ip -n "$host" link set lo up
  for end in "$host wire" "$name port$i"; do # both directions
    tc -n ${end% *} qdisc add dev ${end#* } root tbf rate "$rate" burst 256k latency 50ms
  done
  mkdir -p "/etc/netns/$host"
  { echo "127.0.0.1 localhost"; n=0; for h in $names; do n=$((n + 1)); echo "10.77.0.$n $h"; done; } >"/etc/netns/$host/hosts"
done

# mpirun starts its helpers on a host as `rsh -x HOST WORDS`, quoted for a shell there.
cat >"$made/rsh" <<'RSH'
#!/usr/bin/env bash
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts --mount bash -c \
  'hostname "$0" && mount -t tmpfs -o size=2g tmpfs /dev/shm && exec bash -c "$*"' "$host" "$@"
RSH
chmod +x "$made/rsh"

# UCX sees one kernel and would go round the wire.
export UCX_TLS=tcp,self
list=$(for host in $names; do printf '%s:%s,' "$host" "$ranks"; done)
"$made/rsh" "$name-1" "$(printf '%q ' mpirun -launcher ssh -launcher-exec "$made/rsh" \
  -hosts "${list%,}" -n $((hosts * ranks)) "$@")"

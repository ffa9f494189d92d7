#!/usr/bin/env bash
# All nodes of a hostfile, by Open MPI's mpirun: a process a rank.
#   bash launchers/mpi.sh HOSTFILE --scenario hallucination ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

HOSTFILE="${1:?usage: bash launchers/mpi.sh HOSTFILE [FLAG ...]}"
shift
[[ -r $HOSTFILE ]] || fail "no hostfile $HOSTFILE"
command -v mpirun > /dev/null || fail "mpirun is not installed"
mpirun --version | grep -q "Open MPI" || fail "$(command -v mpirun) is not Open MPI's; its options differ"
mapfile -t HOSTS < <(hosts_of "$HOSTFILE")
((${#HOSTS[@]})) || fail "$HOSTFILE names no host; a line is: name slots=8"

export MASTER_ADDR="${MASTER_ADDR:-${HOSTS[0]}}"
MASTER_PORT="${MASTER_PORT:-$(free_port_on "${HOSTS[0]}")}"
export MASTER_PORT
if [[ ${UNLEARN_DS_DOCTOR:-on} != off ]]; then
  "$PYTHON" -m unlearn_ds.doctor --hostfile "$HOSTFILE" --master_port "$MASTER_PORT" "$@"
fi
exports=()
while IFS= read -r name; do exports+=(-x "$name"); done < <(forwarded_names)
((EUID)) || exports+=(--allow-run-as-root)

# Ranks compute with threads: mpirun would bind each to one core.
exec "$PYTHON" "$LAUNCHERS/supervise.py" --ranks_elsewhere \
  mpirun --hostfile "$HOSTFILE" -np "$(slots_of "$HOSTFILE")" --bind-to none "${exports[@]}" \
  "$PYTHON" -u "$LAUNCHERS/train.py" "$@"

#!/usr/bin/env bash
# All nodes of a hostfile, by Open MPI's mpirun: a process a rank.
#   bash launchers/mpi.sh HOSTFILE --scenario hallucination ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

need_hostfile "$@"
command -v mpirun > /dev/null || fail "mpirun is not installed"
mpirun --version | grep -q "Open MPI" || fail "$(command -v mpirun) is not Open MPI's; its options differ"
prepare_nodes "$@"
shift
exports=()
while IFS= read -r name; do exports+=(-x "$name"); done < <(forwarded_names)
((EUID)) || exports+=(--allow-run-as-root)

# Ranks compute with threads: mpirun would bind each to one core.
exec "$PYTHON" "$LAUNCHERS/supervise.py" --ranks_elsewhere \
  mpirun --hostfile "$HOSTFILE" -np "$(slots_of "$HOSTFILE")" --bind-to none "${exports[@]}" \
  "$PYTHON" -u "$LAUNCHERS/train.py" "$@"

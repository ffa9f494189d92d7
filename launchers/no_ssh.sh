#!/usr/bin/env bash
# The ranks of this node, by the deepspeed launcher. Run it on every node, with the same hostfile and flags of train.py:
#   NODE_RANK=0 bash launchers/no_ssh.sh HOSTFILE --scenario hallucination ...
# Without NODE_RANK the place of NODE_NAME (default: this host's name) in the hostfile is taken.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

need_hostfile "$@"
HOSTFILE="$1"
shift
[[ -r $HOSTFILE ]] || fail "no hostfile $HOSTFILE"
mapfile -t HOSTS < <(hosts_of "$HOSTFILE")
((${#HOSTS[@]})) || fail "$HOSTFILE names no host; a line is: name slots=8"
if [[ -z ${NODE_RANK:-} ]]; then
  name="${NODE_NAME:-$(uname -n)}"
  for rank in "${!HOSTS[@]}"; do [[ ${HOSTS[rank]} == "$name" ]] && NODE_RANK=$rank; done
  [[ -n ${NODE_RANK:-} ]] || fail "$HOSTFILE does not name $name: set NODE_RANK, or NODE_NAME as the hostfile has it"
fi

exec "$PYTHON" "$LAUNCHERS/supervise.py" "$PYTHON" -m deepspeed.launcher.runner --quiet \
  --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" \
  --master_addr "${MASTER_ADDR:-${HOSTS[0]}}" --master_port "${MASTER_PORT:-29500}" \
  "$LAUNCHERS/train.py" "$@"

#!/usr/bin/env bash
# All nodes of a DeepSpeed hostfile, over ssh, from one of them or from outside:
#   bash launchers/hostfile.sh HOSTFILE --scenario hallucination ...
# The doctor looks at every node first. Ctrl-C, SIGTERM and SIGUSR1 make every rank save and leave.
# Each node needs this folder and the same Python at the same path, and a key of ssh that asks for nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

need_hostfile "$@"
command -v pdsh > /dev/null || fail "pdsh is not installed; without it run launchers/no_ssh.sh on each node"
prepare_nodes "$@"
shift

# pdsh replaces %-signs and the shells on both sides split words: what runs on a node travels encoded. TMPDIR may not be
# there on every node, /tmp is, and is each node's own.
PREFIX="/tmp/unlearn_ds-$(uname -n)-$$"
on_node=$(
  while IFS= read -r name; do printf 'export %s=%q\n' "$name" "${!name}"; done < <(forwarded_names)
  printf 'export UNLEARN_DS_PID_FILE=%q PYTHON=%q\n' "$PREFIX.pid" "$PYTHON"
  printf 'printf %%s %q > %q\n' "$(< "$HOSTFILE")" "$PREFIX.hosts"
  printf 'cd %q\nbash %q' "$PWD" "$LAUNCHERS/no_ssh.sh"
  printf ' %q' "$PREFIX.hosts" "$@"
  printf '\ncode=$?\nrm -f %q\nexit $code' "$PREFIX.hosts"
)
on_every_node() {
  local IFS=,
  pdsh -R ssh -S -f "${#HOSTS[@]}" -w "${HOSTS[*]}" "$1"
}
stop() { on_every_node "kill -USR1 \$(cat $(printf %q "$PREFIX.pid")) 2> /dev/null" || true; }

# A session of its own: pdsh answers Ctrl-C with questions, and would leave the nodes to themselves.
setsid bash -c "$(declare -f on_every_node); HOSTS=(${HOSTS[*]}); on_every_node \"\$1\"" _ \
  "export NODE_NAME=%h; bash -c \"\$(echo $(base64 -w 0 <<< "$on_node") | base64 -d)\"" &
child=$!
signalled=1
trap 'signalled=1; stop' INT TERM USR1
while ((signalled)); do  # a signal ends the wait, not the run
  signalled=0
  wait "$child" && code=0 || code=$?
done
# Codes of runs pass; 255 is ssh's own, and above 128 a process was killed.
case $code in 0 | 1 | 2 | 3 | 75 | 76) exit "$code" ;; *) exit 76 ;; esac

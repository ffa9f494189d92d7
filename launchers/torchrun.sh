#!/usr/bin/env bash
# The ranks of this node, by torchrun. Run it on every node, with the same flags of train.py:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 bash launchers/torchrun.sh --scenario hallucination ...
# Slurm, an Indexed Job of Kubernetes and Kubeflow set these by names of their own, which are read too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

NNODES="${NNODES:-${SLURM_NNODES:-${PET_NNODES:-1}}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-${PET_NODE_RANK:-0}}}}"
MASTER_ADDR="${MASTER_ADDR:-${PET_MASTER_ADDR:-}}"
MASTER_PORT="${MASTER_PORT:-${PET_MASTER_PORT:-29500}}"
GPUS_PER_NODE="${GPUS_PER_NODE:-${PET_NPROC_PER_NODE:-}}"
if [[ -z $GPUS_PER_NODE || $GPUS_PER_NODE == auto || $GPUS_PER_NODE == gpu ]]; then
  if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
    GPUS_PER_NODE=1
  elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    GPUS_PER_NODE=$(awk -F, '{ print NF }' <<< "$CUDA_VISIBLE_DEVICES")
  else
    GPUS_PER_NODE=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
  fi
  ((GPUS_PER_NODE > 0)) || GPUS_PER_NODE=1
fi
[[ $GPUS_PER_NODE =~ ^[0-9]+$ ]] || fail "GPUS_PER_NODE is a number; got '$GPUS_PER_NODE'"
((NODE_RANK)) || check_port "$MASTER_PORT"
if ((NNODES > 1)) && [[ -z $MASTER_ADDR ]]; then
  fail "NNODES is $NNODES and MASTER_ADDR is unset: give all nodes the name of node 0"
fi
# Kubeflow's names for what the command line says: torchrun would read both.
unset "${!PET_@}"

# Slurm and Kubernetes may send SIGTERM to every process of a node: torchrun would kill its ranks while they save.
exec "$PYTHON" "$LAUNCHERS/supervise.py" "$PYTHON" "$LAUNCHERS/agent.py" \
  --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS_PER_NODE" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT" --max_restarts 0 --signals_to_handle SIGQUIT \
  "$LAUNCHERS/train.py" "$@"

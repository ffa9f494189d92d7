# Environment of every rank, sourced by the launchers beside it. What is set already stays as it is.
# Here alone: what has to reach every node is in FORWARDED, and defaults of it stand below.

# A rank that waits for another for too long ends, and says in which collective operation it waited.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# torch warns of hosts without a reverse name, on every connection.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# Packed batches have another length at every step, which splits the blocks of a fixed-size allocator.
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}"
# Compilers lock and rename files in their caches: a local disk, one folder a user.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/torch_extensions-$(id -u)}"

# Names, and beginnings of names that end in _, of the variables that ranks on other nodes get too.
FORWARDED=(
  PATH LD_LIBRARY_PATH PYTHONPATH VIRTUAL_ENV TMPDIR XDG_CACHE_HOME
  MASTER_ADDR MASTER_PORT NNODES GPUS_PER_NODE DS_ACCELERATOR CUDA_HOME CUDA_DEVICE_MAX_CONNECTIONS
  NCCL_ GLOO_ UCX_ FI_ TORCH_ PYTORCH_ TORCHINDUCTOR_ TRITON_ OMP_ MKL_ DS_BUILD_ DEEPSPEED_
  HF_ HUGGING_FACE_ TRANSFORMERS_ TOKENIZERS_ UNLEARN_DS_ WANDB_ http_proxy https_proxy no_proxy
  HTTP_PROXY HTTPS_PROXY NO_PROXY
)
# For the doctor, which tells what else is set and would not arrive.
export UNLEARN_DS_FORWARDED="${FORWARDED[*]}"

# Names of the variables in FORWARDED that are set, one a line.
forwarded_names() {
  local name pattern
  while IFS= read -r name; do
    # Of this node: its supervisor's folder, its own interface.
    [[ $name == UNLEARN_DS_STATUS || $name == UNLEARN_DS_PID_FILE ]] && continue
    for pattern in "${FORWARDED[@]}"; do
      if [[ $name == "$pattern" || ($pattern == *_ && $name == "$pattern"*) ]]; then
        printf '%s\n' "$name"
        break
      fi
    done
  done < <(compgen -e)
}

# Hosts of a DeepSpeed hostfile ("name slots=8", comments and blank lines allowed), one a line.
hosts_of() { sed -e 's/#.*//' -e 's/[[:space:]]*$//' "$1" | awk 'NF { print $1 }'; }

# Ranks that a DeepSpeed hostfile has room for.
slots_of() { sed -e 's/#.*//' "$1" | awk 'NF { split($2, part, "="); total += part[2] } END { print total + 0 }'; }

# A port that is free on a host: one that an earlier run used can stay taken for minutes.
free_port_on() {
  ssh -o BatchMode=yes -o ConnectTimeout=10 "$1" "$PYTHON" - <<< \
    'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])' ||
    fail "ssh $1 does not work: try it by hand. Ranks on this machine alone need none: no_ssh.sh or torchrun.sh"
}

# Ends where something listens on a port of this node already.
check_port() {
  "$PYTHON" -c 'import sys; from unlearn_ds.preflight import network; network.listen(int(sys.argv[1])).close()' "$1" \
    2> /dev/null ||
    fail "port $1 of this node is busy, or no port: set MASTER_PORT to a free one on all nodes"
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Ends with the words on how a script is used where it was given none.
need_hostfile() { (($#)) || fail "usage: bash ${BASH_SOURCE[1]} HOSTFILE [FLAG ...]"; }

# What hostfile.sh and mpi.sh do before they start anything: hosts, the first one's address, a port, the doctor.
prepare_nodes() { # HOSTFILE [FLAG ...]
  [[ -r $1 ]] || fail "no hostfile $1"
  HOSTFILE="$(realpath "$1")"
  shift
  mapfile -t HOSTS < <(hosts_of "$HOSTFILE")
  ((${#HOSTS[@]})) || fail "$HOSTFILE names no host; a line is: name slots=8"
  MASTER_ADDR="${MASTER_ADDR:-${HOSTS[0]}}"
  MASTER_PORT="${MASTER_PORT:-$(free_port_on "${HOSTS[0]}")}" || exit
  export MASTER_ADDR MASTER_PORT
  if [[ ${UNLEARN_DS_DOCTOR:-on} != off ]]; then
    "$PYTHON" -m unlearn_ds.doctor --hostfile "$HOSTFILE" --master_port "$MASTER_PORT" "$@"
  fi
}

# A file of this name on DeepSpeed's way would make its runner crash at a blank line or a comment, and export values
# without quotes: nothing here reads it, so what stands in it would silently not arrive.
for folder in "$HOME" .; do
  [[ -e $folder/.deepspeed_env ]] && echo "note: $folder/.deepspeed_env is not read; export the variables instead" >&2
done

LAUNCHERS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Its path, for machines whose login shell knows no Python, or another.
PYTHON="$(command -v "${PYTHON:-python}")" || fail "no ${PYTHON:-python} on the path: activate the environment first"

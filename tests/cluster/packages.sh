#!/usr/bin/env bash
# What a cluster on one machine is made of, from Debian's packages. Says what is missing, and ends with 1, where it cannot
# be installed: the tests in this folder are then skipped with the same words.
set -uo pipefail
declare -A package=(
  [sshd]=openssh-server [ssh]=openssh-client [pdsh]=pdsh [mpirun]=openmpi-bin [slurmctld]=slurmctld [slurmd]=slurmd
  [sbatch]=slurm-client [munged]=munge [ip]=iproute2
)
PATH="$PATH:/usr/sbin:/sbin"
missing=()
for command in "${!package[@]}"; do command -v "$command" > /dev/null || missing+=("${package[$command]}"); done
((${#missing[@]})) || exit 0
if ((EUID)) || ! command -v apt-get > /dev/null; then
  echo "tests/cluster: ${missing[*]} missing, and only root can install Debian's packages: its tests are skipped" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } > /dev/null 2>&1; then
  echo "tests/cluster: ${missing[*]} cannot be installed here: its tests are skipped" >&2
  exit 1
fi

#!/usr/bin/env bash
# Hosts on one machine: up.sh FOLDER NUM_NODES SUBNET, for example: up.sh "$(mktemp -d)" 3 77
# Each is a network, a host name and a view of the disk of its own (/etc/hosts, ~/.ssh, FOLDER/own), joined to the
# others by a bridge as 10.SUBNET.0.N, with an sshd; node1 also runs slurmctld, every node slurmd. down.sh removes all.
# FOLDER/enter NODE COMMAND... runs a command on a node.
set -euo pipefail
FOLDER="$(realpath -m "$1")" NUM_NODES="$2" SUBNET="$3"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PATH="$PATH:/usr/sbin:/sbin"
mkdir -p "$FOLDER"/{ssh,slurm/state,log,small,own} /run/sshd
chmod 755 "$FOLDER"
# A disk that is soon full and that all nodes share: they take over what is mounted now.
mount -t tmpfs -o size=8m tmpfs "$FOLDER/small"
trap 'status=$?; ((status == 0)) || { cat "$FOLDER"/log/* >&2; bash "$HERE/down.sh" "$FOLDER"; }' EXIT

echo "127.0.0.1 localhost" > "$FOLDER/hosts"
for ((n = 1; n <= NUM_NODES; n++)); do echo "10.$SUBNET.0.$n node$n" >> "$FOLDER/hosts"; done

ssh-keygen -q -t ed25519 -N "" -f "$FOLDER/ssh/id_ed25519"
ssh-keygen -q -t ed25519 -N "" -f "$FOLDER/host_key"
cat > "$FOLDER/ssh/config" << CONFIG
Host node*
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
CONFIG
chmod 700 "$FOLDER/ssh"

bridge="cluster$SUBNET"
ip link add "$bridge" type bridge
echo "$bridge" > "$FOLDER/bridge"  # what down.sh may delete
ip link set "$bridge" up

# A process that holds the namespaces of a node open; its output would keep the caller's pipe open.
for ((n = 1; n <= NUM_NODES; n++)); do
  unshare --net --uts --mount --propagation private sleep infinity > /dev/null 2>&1 < /dev/null &
  echo $! > "$FOLDER/node$n.pid"
done
cat > "$FOLDER/enter" << ENTER
#!/usr/bin/env bash
# Run a command on a node: enter node1 COMMAND...
node="\$1"; shift
export SLURM_CONF=$FOLDER/slurm/slurm.conf
exec nsenter --net --uts --mount --target "\$(cat "$FOLDER/\$node.pid")" --wdns="\$PWD" "\$@"
ENTER
chmod +x "$FOLDER/enter"

for ((n = 1; n <= NUM_NODES; n++)); do
  pid=$(cat "$FOLDER/node$n.pid")
  # unshare has its namespaces some time after it was started.
  until [[ $(readlink "/proc/$pid/ns/net") != $(readlink /proc/self/ns/net) &&
    $(readlink "/proc/$pid/ns/mnt") != $(readlink /proc/self/ns/mnt) ]]; do sleep 0.05; done
  ip link add "c$SUBNET-$n" type veth peer name eth0 netns "$pid"
  ip link set "c$SUBNET-$n" master "$bridge" up
  "$FOLDER/enter" "node$n" bash -euc "
    hostname node$n
    ip link set lo up
    ip addr add 10.$SUBNET.0.$n/24 dev eth0
    ip link set eth0 up
    mount --bind '$FOLDER/hosts' /etc/hosts
    # ssh takes the home of the user's entry, whatever HOME is.
    mkdir -p ~root/.ssh
    mount --bind '$FOLDER/ssh' ~root/.ssh
    mount -t tmpfs -o size=64m tmpfs '$FOLDER/own'
  "
  cat > "$FOLDER/sshd$n.conf" << CONFIG
ListenAddress 10.$SUBNET.0.$n
HostKey $FOLDER/host_key
AuthorizedKeysFile $FOLDER/ssh/id_ed25519.pub
PidFile $FOLDER/sshd$n.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
CONFIG
  "$FOLDER/enter" "node$n" /usr/sbin/sshd -f "$FOLDER/sshd$n.conf" -E "$FOLDER/log/sshd$n"
done

# One munged serves all: they share the disk.
dd if=/dev/urandom of="$FOLDER/munge.key" bs=1024 count=1 status=none
chmod 400 "$FOLDER/munge.key"
munged --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" --pid-file="$FOLDER/munged.pid" \
  --log-file="$FOLDER/log/munged" --seed-file="$FOLDER/munge.seed" > /dev/null 2>&1
cat > "$FOLDER/slurm/slurm.conf" << CONFIG
ClusterName=cluster$SUBNET
SlurmctldHost=node1(10.$SUBNET.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
CredType=cred/munge
StateSaveLocation=$FOLDER/slurm/state
SlurmdSpoolDir=$FOLDER/slurm/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld
SlurmdLogFile=$FOLDER/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName=node[1-$NUM_NODES] NodeAddr=10.$SUBNET.0.[1-$NUM_NODES] CPUs=2 RealMemory=8000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIG
echo "CgroupPlugin=cgroup/v1" > "$FOLDER/slurm/cgroup.conf"
"$FOLDER/enter" node1 slurmctld > /dev/null 2>&1 < /dev/null
for ((n = 1; n <= NUM_NODES; n++)); do
  mkdir -p "$FOLDER/slurm/spool-node$n"
  "$FOLDER/enter" "node$n" slurmd -N "node$n" > /dev/null 2>&1 < /dev/null
done
for ((tries = 0; tries < 100; tries++)); do
  [[ $("$FOLDER/enter" node1 sinfo --noheader --format %D --states idle) == "$NUM_NODES" ]] && exit 0
  sleep 0.2
done
echo "Slurm's nodes are not idle after 20 s" >&2
exit 1

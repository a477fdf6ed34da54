#!/usr/bin/env bash
# A SLURM of three nodes on this machine, for as long as COMMAND (default: a shell) runs on its
# login host:
#
#   sudo tests/slurm/cluster.sh [COMMAND ...]
#
# Needs root and Debian's packages slurm-wlm, munge and iproute2. For programs, each node is a host
# of its own: it has its own processes and its own network, with an interface of another name, and
# its host name is not the name of the node.
#
# All of it is in one process namespace, which the kernel empties however the script ends, and in
# one mount namespace, where a file system in memory covers /etc/slurm. So nothing stays behind, and
# nothing of this machine is changed.
set -euo pipefail

nodes=(n1 n2 n3)
hosts=(anton berta caesar)
interfaces=(eth0 ens5 bond7)
network=10.77.0
folder=/etc/slurm
namespaces=(--pid --fork --kill-child --mount-proc --net --uts)

case ${1:-} in
--login) # inside the namespaces
    shift
    ;;
--node)
    hostname "${hosts[$2]}"
    ip link set lo up
    until ip address add "$network.1$2/24" dev "${interfaces[$2]}" 2>/dev/null; do sleep 0.05; done
    ip link set "${interfaces[$2]}" up
    slurmd -D &
    wait
    exit
    ;;
*)
    exec unshare "${namespaces[@]}" "$0" --login "$@"
    ;;
esac

mount -t tmpfs tmpfs "$folder"
hostname login
ip link set lo up
ip link add switch type bridge
ip address add "$network.1/24" dev switch
ip link set switch up

# There are no cgroups (proctrack/linuxproc), because a test must not write to this machine's.
#
# Some times are shorter than SLURM's defaults:
# - cred_expire: how long a requeued job is held back (120 s)
# - SlurmdTimeout: when a silent node counts as dead (300 s); it stays longer than the 32 s after
#   which srun gives up a task
# - bf_interval: between looks at the queue (30 s)
#
# JobRequeue, KillOnBadExit and WaitTime are settings of some sites that the script must cope with.
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login($network.1)
SlurmUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmdTimeout=60
SchedulerParameters=bf_interval=5
JobRequeue=0
KillOnBadExit=1
WaitTime=5
ReturnToService=2
MinJobAge=3600
MpiDefault=none
MailProg=/bin/true
$(for i in "${!nodes[@]}"; do
    echo "NodeName=${nodes[i]} NodeHostName=${hosts[i]} NodeAddr=$network.1$i CPUs=2 Gres=gpu:2"
done)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

# SLURM only checks that the files are there: for it these are two GPUs.
echo "Name=gpu File=/dev/null,/dev/zero" >"$folder/gres.conf"

dd if=/dev/urandom of="$folder/munge.key" bs=64 count=1 status=none
chmod 600 "$folder/munge.key"
mkdir "$folder/state" "${nodes[@]/#/$folder/spool.}"
munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" \
    --log-file="$folder/munged.log" 2>"$folder/munged.err"
slurmctld -D &>/dev/null &

for i in "${!nodes[@]}"; do
    unshare "${namespaces[@]}" "$0" --node "$i" &>"$folder/node.${nodes[i]}.log" &
    echo $! >"$folder/node.${nodes[i]}.pid"

    # Until the node has its own network.
    while [[ $(readlink "/proc/$!/ns/net") == "$(readlink /proc/self/ns/net)" ]]; do
        sleep 0.01
    done
    ip link add "to-${nodes[i]}" type veth peer name "${interfaces[i]}" netns $!
    ip link set "to-${nodes[i]}" master switch up
done

for _ in {1..300}; do
    if [[ $(sinfo --noheader --format %D --states idle 2>/dev/null) == "${#nodes[@]}" ]]; then
        sinfo
        "${@:-bash}"
        exit
    fi
    sleep 0.1
done
echo "$0: the nodes did not come up within 30 s:" >&2
tail -n 20 "$folder"/*.{log,err} >&2
exit 1

#!/usr/bin/env bash
# A real Slurm of several nodes on one machine, for the tests. Needs root, Slurm and munge; no systemd, no database.
#
#   cluster.sh up                 start it and wait until all nodes are idle
#   eval "$(cluster.sh env)"      SLURM_CONF: sbatch, squeue, scontrol now talk to this cluster
#   cluster.sh down               stop everything it started, and remove every trace
#   cluster.sh power-off NODE     kill every process of the node at once
#   cluster.sh start-node NODE    bring it back
#   cluster.sh kill-daemon NODE   kill its slurmd only: what runs there lives on
#   cluster.sh cut NODE, heal NODE           its network (ns mode)
#   cluster.sh kill-controller, start-controller
#   cluster.sh exec NODE CMD...   run CMD inside the node
#   cluster.sh mode               ns or flat
#
# In ns mode each node is a set of namespaces with a slurmd in it: its own hostname, address, ports, processes and
# /dev/shm. In flat mode, where the kernel refuses namespaces, all nodes are 127.0.0.1. Both share the disk.
# Settings: COOKBOOK_SLURM_DIR, _NODES (4), _GPUS (8 fake ones each), _MODE (auto, ns, flat).
set -euo pipefail
export PATH=/usr/sbin:/sbin:$PATH
DIR=${COOKBOOK_SLURM_DIR:-${TMPDIR:-/tmp}/cookbook-slurm}
NODES=${COOKBOOK_SLURM_NODES:-4}
GPUS=${COOKBOOK_SLURM_GPUS:-8}
MODE=${COOKBOOK_SLURM_MODE:-auto}
NET=10.74.0
PORT=16917
BRIDGE=ckslurm0
HOSTS_MARK='# cookbook-slurm'
SELF=$(readlink -f "$0")
export SLURM_CONF=$DIR/slurm.conf

die() {
    echo "cluster.sh: $*" >&2
    exit 1
}
nodes() { seq -f 'n%.0f' 1 "$NODES"; }
pid_of() { cat "$DIR/pid/$1" 2>/dev/null || true; }
alive() { kill -0 "${1:-none}" 2>/dev/null; }

stop_pid() { # NAME: TERM, and KILL after four seconds
    local pid
    pid=$(pid_of "$1")
    alive "$pid" || return 0
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 40); do
        alive "$pid" || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

namespaces_work() { # try the very things that ns mode needs
    unshare --net --uts --pid --mount --ipc --fork --mount-proc true 2>/dev/null || return 1
    ip link add "${BRIDGE}a" type veth peer name "${BRIDGE}b" 2>/dev/null || return 1
    ip link del "${BRIDGE}a"
    ip link add "${BRIDGE}a" type bridge 2>/dev/null || return 1
    ip link del "${BRIDGE}a"
}

# With proctrack/linuxproc a process whose parent has died escapes Slurm's kill; real clusters track by cgroup.
proctrack() {
    local probe=/sys/fs/cgroup/freezer/cookbook_slurm_test
    if mkdir "$probe" 2>/dev/null && rmdir "$probe"; then echo cgroup; else echo linuxproc; fi
}

write_conf() {
    local host k address=127.0.0.1
    host=$(hostname -s)
    if [ "$MODE" = ns ]; then address=$NET.1; fi
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=cookbook
SlurmctldHost=$host($address)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also the pause before a requeued job may start again: 120 s by default.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/pid/slurmctld
SlurmdPidFile=$DIR/pid/slurmd.%n
SlurmctldLogFile=$DIR/log/slurmctld
SlurmdLogFile=$DIR/log/slurmd.%n
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/$(proctrack)
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=1
# Believe the lines below, not the hardware.
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
MinJobAge=3600
MailProg=/bin/true
GresTypes=gpu
CONF
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no >"$DIR/cgroup.conf"
    : >"$DIR/hosts.nodes"
    for k in $(seq "$NODES"); do
        if [ "$MODE" = ns ]; then
            address="NodeHostname=n$k NodeAddr=$NET.$((10 + k)) Port=$((PORT + 1))"
            echo "$NET.$((10 + k)) n$k" >>"$DIR/hosts.nodes"
        else
            address="NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + k))"
        fi
        echo "NodeName=n$k $address CPUs=64 RealMemory=512000 Gres=gpu:fake:$GPUS State=UNKNOWN" >>"$DIR/slurm.conf"
    done
    # One device file for each GPU, or Slurm counts one.
    echo "NodeName=n[1-$NODES] Name=gpu Type=fake File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
    cat >>"$DIR/slurm.conf" <<CONF
PartitionName=main Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-$NODES] Default=NO MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
}

hosts_without_ours() { # not sed -i: in a container the file is often a mount, which cannot be renamed over
    local rest
    rest=$(grep -v "$HOSTS_MARK\$" /etc/hosts || true)
    printf '%s\n' "$rest" >/etc/hosts
}

start_munge() { # with a key and socket of its own: the system's munge is left alone
    install -d -m 755 "$DIR/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
    munged --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" --pid-file="$DIR/pid/munged" \
        --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed"
}

node_init() { # the first process inside a node
    local name=$1 k=${1#n} daemon
    hostname "$name"
    for _ in $(seq 100); do
        ip link show eth0 >/dev/null 2>&1 && break
        sleep 0.05
    done
    ip link set lo up
    ip addr add "$NET.$((10 + k))/24" dev eth0
    ip link set eth0 up
    { echo "127.0.0.1 localhost" && echo "$NET.1 $(cat "$DIR/controller")" && cat "$DIR/hosts.nodes"; } \
        >"$DIR/hosts.$name"
    mount --bind "$DIR/hosts.$name" /etc/hosts
    # Names come from that file alone: without this, reverse look-ups wait for a DNS that is out of reach.
    { grep -v '^hosts:' /etc/nsswitch.conf 2>/dev/null || true; echo 'hosts: files'; } >"$DIR/nsswitch.$name"
    if [ -e /etc/nsswitch.conf ]; then mount --bind "$DIR/nsswitch.$name" /etc/nsswitch.conf; fi
    mount -t tmpfs tmpfs /dev/shm
    slurmd -D -N "$name" >>"$DIR/log/slurmd.$name.out" 2>&1 &
    daemon=$!
    trap 'kill -TERM $daemon 2>/dev/null; exit 0' TERM
    while :; do # stays, and takes in orphans, when the daemon is killed
        wait || true
        sleep 0.5
    done
}

start_node() {
    local name=$1 outer child=
    mkdir -p "$DIR/spool/$name"
    if [ "$MODE" = flat ]; then
        slurmd -N "$name"
        return
    fi
    child=$(pid_of "init.$name")
    if alive "$child"; then # only its daemon is gone
        nsenter -t "$child" -a slurmd -N "$name"
        return
    fi
    # --kill-child: the whole node dies with this process.
    COOKBOOK_SLURM_DIR=$DIR setsid unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc \
        bash "$SELF" node-init "$name" >>"$DIR/log/init.$name" 2>&1 </dev/null &
    outer=$!
    for _ in $(seq 100); do
        child=$(tr -d ' ' <"/proc/$outer/task/$outer/children" 2>/dev/null || true)
        [ -n "$child" ] && break
        sleep 0.02
    done
    [ -n "$child" ] || die "node $name did not start: $(cat "$DIR/log/init.$name")"
    echo "$child" >"$DIR/pid/init.$name"
    ip link add "ck-$name" type veth peer name eth0 netns "$child"
    ip link set "ck-$name" master "$BRIDGE" up
}

power_off() {
    local name=$1 pid
    if [ "$MODE" = ns ]; then
        pid=$(pid_of "init.$name")
        if alive "$pid"; then kill -9 "$pid"; fi
        for _ in $(seq 50); do
            alive "$pid" || break
            sleep 0.05
        done
        ip link del "ck-$name" 2>/dev/null || true # which else lives on for a moment, and takes its name
    else
        grep -lzx "SLURMD_NODENAME=$name" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 |
            xargs -r kill -9 2>/dev/null || true
        stop_pid "slurmd.$name"
    fi
    rm -f "$DIR/pid/init.$name" "$DIR/pid/slurmd.$name"
}

kill_daemon() {
    local name=$1 pid
    pid=$(pid_of "slurmd.$name")
    if [ "$MODE" = ns ]; then # the file holds the number inside the node
        pid=$(pgrep --ns "$(pid_of "init.$name")" --nslist pid -f "slurmd .*-N $name\$" | head -n 1)
    fi
    kill -9 "$pid"
}

wait_until_idle() {
    for _ in $(seq 300); do
        [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ] && return 0
        sleep 0.1
    done
    die "not all nodes became idle: $(sinfo -h -N -o '%N %t' 2>&1) $(tail -n 3 "$DIR"/log/slurm*)"
}

up() {
    local program k name
    [ "$(id -u)" = 0 ] || die "needs root"
    for program in slurmctld slurmd sbatch munged ip unshare nsenter; do
        command -v "$program" >/dev/null || die "$program is not installed"
    done
    down
    mkdir -p "$DIR"/{state,spool,log,pid,dev}
    chmod 755 "$DIR"
    if [ "$MODE" = auto ]; then if namespaces_work; then MODE=ns; else MODE=flat; fi; fi
    printf 'MODE=%s\nNODES=%s\nGPUS=%s\n' "$MODE" "$NODES" "$GPUS" >"$DIR/settings"
    hostname -s >"$DIR/controller"
    for k in $(seq 0 $((GPUS - 1))); do mknod "$DIR/dev/gpu$k" c 1 3 2>/dev/null || : >"$DIR/dev/gpu$k"; done
    write_conf
    start_munge
    if [ "$MODE" = ns ]; then
        ip link add "$BRIDGE" type bridge
        ip addr add "$NET.1/24" dev "$BRIDGE"
        ip link set "$BRIDGE" up
    else
        for name in $(nodes); do echo "127.0.0.1 $name $HOSTS_MARK"; done >>/etc/hosts
    fi
    slurmctld
    for name in $(nodes); do start_node "$name"; done
    wait_until_idle
}

down() {
    local name k
    if [ ! -e "$DIR/settings" ]; then return; fi
    # shellcheck source=/dev/null
    . "$DIR/settings"
    timeout 10 scancel --state=RUNNING,PENDING,COMPLETING --user=root 2>/dev/null || true
    if [ "$MODE" = flat ]; then sleep 1; fi
    for name in $(nodes); do power_off "$name"; done
    if [ "$MODE" = ns ]; then ip link del "$BRIDGE" 2>/dev/null || true; else hosts_without_ours; fi
    stop_pid slurmctld
    stop_pid munged
    for k in $(seq "$NODES"); do
        find "/sys/fs/cgroup/freezer/slurm_n$k" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    rm -rf "$DIR"
}

command=${1:-}
shift || true
if [ "$command" != up ] && [ -e "$DIR/settings" ]; then
    # shellcheck source=/dev/null
    . "$DIR/settings"
fi
case $command in
    up) up ;;
    down) down ;;
    env) echo "export SLURM_CONF=$DIR/slurm.conf" ;;
    mode) echo "$MODE" ;;
    node-init) node_init "$1" ;;
    start-node) start_node "$1" ;;
    power-off) power_off "$1" ;;
    kill-daemon) kill_daemon "$1" ;;
    cut) ip link set "ck-$1" down ;;
    heal) ip link set "ck-$1" up ;;
    kill-controller) kill -9 "$(pid_of slurmctld)" ;;
    start-controller) slurmctld ;;
    exec)
        node=$1
        shift
        if [ "$MODE" = flat ]; then exec "$@"; fi
        # shellcheck disable=SC2016
        exec nsenter -t "$(pid_of "init.$node")" -a bash -c 'cd "$0" && exec "$@"' "$PWD" "$@" ;;
    *)
        sed -n '2,/^set -/{/^#/p}' "$SELF"
        exit 2 ;;
esac

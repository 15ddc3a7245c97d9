#!/usr/bin/env bash
# Bring up a small but real Slurm cluster on this machine (README.md says how to use it).
# Does nothing where it is up, restarts what is missing, refuses other settings under a running cluster.
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NODES=${C2G_SLURM_NODES:-4} CPUS=${C2G_SLURM_CPUS:-4} MEM=${C2G_SLURM_MEM:-8000} GPUS=${C2G_SLURM_GPUS:-0}
PORT=${C2G_SLURM_PORT:-16817}
ACCT=${C2G_SLURM_ACCT:-auto} NS=${C2G_SLURM_NS:-auto}

for value in "$NODES" "$CPUS" "$MEM" "$GPUS" "$PORT"; do
    [[ $value =~ ^[0-9]+$ ]] || die "C2G_SLURM_NODES, CPUS, MEM, GPUS and PORT must be whole numbers: got $value"
done
[ "$NODES" -gt 0 ] || die "C2G_SLURM_NODES must be at least 1"
for program in munged slurmctld slurmd sbatch; do
    command -v $program >/dev/null || die "$program not found: apt-get install slurm-wlm"
done
if [ "$ACCT" = auto ]; then
    ACCT=squeue
    if command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null; then ACCT=dbd; fi
fi
case $ACCT in dbd | squeue | none) ;; *) die "C2G_SLURM_ACCT must be auto, dbd, squeue or none: got $ACCT" ;; esac
if [ "$NS" = auto ]; then
    NS=0
    if unshare --uts --pid --mount --fork --mount-proc true 2>/dev/null; then NS=1; fi
fi
names=()
for i in $(seq "$NODES"); do names+=("n$i"); done

lock
mkdir -p "$ETC" "$RUN/pids" "$LOG" "$BIN" "$DIR/spool" "$DIR/state" "$DIR/dev"
chmod 755 "$DIR" "$ETC" "$RUN" "$LOG" "$BIN"

# --- configuration ------------------------------------------------------------------
configuration() {
    cat <<CONF
# namespaces=$NS sacct=$ACCT
ClusterName=c2g
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
AuthType=auth/munge
# a munge of its own; cred_expire is also how long a requeued job is held back (default 120)
AuthInfo=socket=$RUN/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd-%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MpiDefault=none
SwitchType=switch/none

# no cgroups, no pinning
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE

# pretend hardware; without DefMemPerCPU a job that names no memory takes a whole node
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=128
SlurmdParameters=config_overrides

# studies are arrays; ended jobs stay in memory (and count) for MinJobAge
MaxArraySize=10001
MaxJobCount=50000
MinJobAge=86400

# act at once
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_yield_interval=1000000
PriorityType=priority/basic
ReturnToService=1
JobRequeue=1
KillWait=3
WaitTime=0
InactiveLimit=0
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
CompleteWait=0
UnkillableStepTimeout=30

# a waiting job of a higher tier throws jobs of the tier "low" back into the queue;
# their --signal is delivered first, GraceTime seconds before the kill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.log
CONF
    if [ "$ACCT" = dbd ]; then
        echo "AccountingStorageType=accounting_storage/slurmdbd"
        echo "AccountingStorageHost=127.0.0.1"
        echo "AccountingStoragePort=$((PORT + 1))"
        echo "AccountingStoragePass=$RUN/munge.socket"
    else
        echo "AccountingStorageType=accounting_storage/none"
    fi
    local i gres="" all="Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP"
    if [ "$GPUS" -gt 0 ]; then
        echo "GresTypes=gpu"
        gres=" Gres=gpu:$GPUS"
    fi
    for i in $(seq "$NODES"); do
        echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.1 Port=$((PORT + 10 + i)) CPUs=$CPUS RealMemory=$MEM$gres State=UNKNOWN"
    done
    echo "PartitionName=main $all Default=YES PriorityTier=10 PreemptMode=OFF"
    echo "PartitionName=low  $all PriorityTier=1  PreemptMode=REQUEUE GraceTime=10"
    echo "PartitionName=high $all PriorityTier=20 PreemptMode=OFF"
}

new=$(configuration)
if [ "$new" != "$(cat "$SLURM_CONF" 2>/dev/null)" ]; then
    for record in "$RUN"/pids/*; do
        ! alive "${record##*/}" || die "running with other settings ($DIR): down.sh first"
    done
    echo "$new" >"$SLURM_CONF"
elif alive munged && alive slurmctld && ready "${names[@]}"; then
    say "already up ($DIR)"
    exit 0
fi

free() { # NAME PORT: it has it, or nobody
    alive "$1" || ! (: <"/dev/tcp/127.0.0.1/$2") 2>/dev/null || die "port $2 of $1 is taken: set C2G_SLURM_PORT (now $PORT)"
}
free slurmctld "$PORT"
if [ "$ACCT" = dbd ]; then free slurmdbd $((PORT + 1)); free mariadb $((PORT + 2)); fi
for i in $(seq "$NODES"); do free "n$i" $((PORT + 10 + i)); done

echo "CgroupPlugin=cgroup/v1" >"$ETC/cgroup.conf"
rm -f "$ETC/gres.conf"
if [ "$GPUS" -gt 0 ]; then
    for g in $(seq 0 $((GPUS - 1))); do
        [ -c "$DIR/dev/gpu$g" ] || mknod "$DIR/dev/gpu$g" c 1 3      # what /dev/null is
    done
    printf '%s\n' "AutoDetect=off" "Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$ETC/gres.conf"
fi

rm -f "$BIN/sacct"
if [ "$ACCT" = squeue ]; then
    cat >"$BIN/sacct" <<'SACCT'
#!/usr/bin/env bash
# stand-in for `sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID]...`, out of slurmctld's memory
ids=()
while [ $# -gt 0 ]; do
    case $1 in
        -j | --jobs) ids+=("$2"); shift 2 ;;
        --jobs=* | -j?*) v=${1#--jobs=}; ids+=("${v#-j}"); shift ;;
        -o | --format) shift 2 ;;
        *) shift ;;
    esac
done
echo 'JobID|State|NodeList'
IFS=,
exec squeue -h -r -t all ${ids:+-j "${ids[*]}"} -o '%i|%T|%N' 2>/dev/null
SACCT
    chmod 755 "$BIN/sacct"
fi
# after `. env.sh` every script here means this cluster, with these settings
cat >"$DIR/env.sh" <<ENV
export C2G_SLURM_DIR=$DIR C2G_SLURM_NODES=$NODES C2G_SLURM_CPUS=$CPUS C2G_SLURM_MEM=$MEM C2G_SLURM_GPUS=$GPUS
export C2G_SLURM_PORT=$PORT C2G_SLURM_ACCT=$ACCT C2G_SLURM_NS=$NS
export SLURM_CONF=$SLURM_CONF
case ":\$PATH:" in *:$BIN:*) ;; *) export PATH=$BIN:\$PATH ;; esac
ENV

edit_hosts "${names[@]}" # so that MASTER_ADDR=n1 resolves
# the default configuration of this machine, unless it has one
if [ ! -e /etc/slurm/slurm.conf ]; then
    mkdir -p /etc/slurm
    ln -sfn "$SLURM_CONF" /etc/slurm/slurm.conf
fi

# --- daemons --------------------------------------------------------------------------
if [ ! -s "$ETC/munge.key" ]; then
    (umask 077; head -c 128 /dev/urandom >"$ETC/munge.key")
fi
launch munged munged --foreground --force --key-file="$ETC/munge.key" --socket="$RUN/munge.socket" \
    --pid-file="$RUN/munged.pid" --seed-file="$RUN/munged.seed" --log-file="$LOG/munged.log"

if [ "$ACCT" = dbd ]; then
    if [ ! -e "$DIR/mysql/.installed" ]; then
        rm -rf "$DIR/mysql"
        mariadb-install-db --no-defaults --datadir="$DIR/mysql" --user=root --auth-root-authentication-method=normal \
            --skip-test-db --skip-name-resolve >"$LOG/mariadb-install.out" 2>&1 ||
            die "mariadb-install-db failed, see $LOG/mariadb-install.out"
        touch "$DIR/mysql/.installed"
    fi
    launch mariadb mariadbd --no-defaults --user=root --datadir="$DIR/mysql" \
        --socket="$RUN/mysql.sock" --pid-file="$RUN/mariadbd.pid" \
        --bind-address=127.0.0.1 --port=$((PORT + 2)) --skip-name-resolve --skip-log-bin \
        --innodb-flush-log-at-trx-commit=0 --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
        --innodb-doublewrite=0 --performance-schema=OFF --log-error="$LOG/mariadb.log"
    sql() { mariadb --no-defaults --socket="$RUN/mysql.sock" -uroot -e "$1"; }
    wait_for mariadb 60 sql "select 1"
    sql "create database if not exists slurm_acct;
         create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm';
         grant all on slurm_acct.* to 'slurm'@'127.0.0.1';"
    (umask 077; cat >"$ETC/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
PidFile=$RUN/slurmdbd.pid
LogFile=$LOG/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CONF
    )
    launch slurmdbd slurmdbd -D
    wait_for slurmdbd 60 sacctmgr -n list cluster
    [ -n "$(sacctmgr -n list cluster format=cluster)" ] || sacctmgr -i add cluster c2g >/dev/null
fi

start_controller
for n in "${names[@]}"; do start_node "$n"; done
await_nodes "${names[@]}"
say "up: $NODES nodes x $CPUS CPUs, sacct=$ACCT, namespaces=$NS, $DIR, ${SECONDS}s"

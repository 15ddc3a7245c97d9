# shellcheck shell=bash
# What up.sh, down.sh, node.sh and ctld.sh share. Sourced, never run.
set -euo pipefail

DIR=${C2G_SLURM_DIR:-/tmp/c2g-slurm}
# shellcheck disable=SC2034
ETC=$DIR/etc RUN=$DIR/run LOG=$DIR/log BIN=$DIR/bin
export SLURM_CONF=$ETC/slurm.conf PATH=$PATH:/usr/sbin:/sbin

say() { echo "c2g-slurm: $*"; }
die() { echo "c2g-slurm: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "must run as root"
[[ $DIR =~ ^/[A-Za-z0-9._/-]+$ && ${#DIR} -le 80 ]] || die "C2G_SLURM_DIR=$DIR must be a short absolute path without blanks"

lock() { # one caller at a time; the next one then sees what this one has done
    until mkdir -p "$DIR" && exec 9>"$DIR/lock" && flock 9 && [ "$DIR/lock" -ef /proc/$$/fd/9 ]; do
        sleep 0.1                            # down.sh --purge has removed the file meanwhile
    done
    [ -O "$DIR" ] || die "$DIR is not yours"
}

# shellcheck disable=SC2094
edit_hosts() ( # NAME...: these, and no others of this cluster, resolve; /etc/hosts may be a bind mount: written in place
    tag=" # c2g-slurm $DIR"
    exec 8</etc/hosts
    flock 8
    text=$(awk -v tag="$tag" 'substr($0, length($0) - length(tag) + 1) != tag' /etc/hosts)
    for n; do text+=$'\n'"127.0.0.1 $n$tag"; done
    [ "$text" = "$(cat /etc/hosts)" ] || echo "$text" >/etc/hosts
)

# --- processes: run/pids/NAME holds "pid starttime" of each one that we started ---
starttime() { # PID: field 22 of its stat; fails for a zombie
    local s
    s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086
    set -- ${s##*) }
    [ "$1" != Z ] && echo "${20}"
}
pid_of() { # NAME: the recorded pid, if it still is that process
    local p t
    { read -r p t <"$RUN/pids/$1"; } 2>/dev/null || return 1
    [ "$(starttime "$p")" = "$t" ] && echo "$p"
}
alive() { pid_of "$1" >/dev/null; }
launch() { # NAME COMMAND...: start it detached, unless it lives; the mark lets down.sh find its children
    local name=$1 p t
    shift
    alive "$name" && return 0
    C2G_SLURM_MARK=$DIR MALLOC_ARENA_MAX=2 setsid "$@" >"$LOG/$name.out" 2>&1 </dev/null 9>&- &
    p=$!
    t=$(starttime $p) || { tail -n 5 "$LOG/$name.out" >&2; die "$name did not start"; }
    echo "$p $t" >"$RUN/pids/$name"
}
wait_for() { # NAME SECONDS COMMAND...: until the command succeeds
    local name=$1 end=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        alive "$name" || { tail -n 10 "$LOG/$name.out" >&2; die "$name died"; }
        [ $SECONDS -lt $end ] || die "$name: not ready in time, see $LOG"
        sleep 0.1
    done
}
stop() { # NAME SIGNAL SECONDS: send it, and KILL where that is outlived; returns when the process is gone
    local p i=0
    if p=$(pid_of "$1"); then
        kill "-$2" "$p" 2>/dev/null || true
        while alive "$1"; do
            sleep 0.05
            i=$((i + 1))
            [ $i -ne $(($3 * 20)) ] || kill -KILL "$p" 2>/dev/null || true
            [ $i -lt $(($3 * 20 + 200)) ] || die "$1 (pid $p) does not end"
        done
    fi
    rm -f "$RUN/pids/$1"
}

start_controller() {
    launch slurmctld slurmctld -D
    wait_for slurmctld 60 scontrol ping
}

# --- nodes: each in its own UTS, PID and mount namespace, where that is permitted ---
namespaces() { grep -q '^# namespaces=1' "$SLURM_CONF"; }
start_node() { # NAME
    mkdir -p "$DIR/spool/$1"
    if namespaces; then
        # the first process of a node names the host, runs slurmd, reaps orphans
        # shellcheck disable=SC2016
        launch "$1" unshare --uts --pid --mount --fork --kill-child --mount-proc bash -c '
            hostname "$0"
            slurmd -D -N "$0" & d=$!
            trap "kill -TERM $d" TERM INT
            while kill -0 $d 2>/dev/null; do wait $d; done' "$1"
    else
        launch "$1" slurmd -D -N "$1"
    fi
}
stop_node() { # NAME [SIGNAL]
    local p
    if namespaces; then
        # its first process is the only child of the recorded one, unshare, which ends when all in there has ended
        if p=$(pid_of "$1"); then kill -KILL "$(tr -d ' ' <"/proc/$p/task/$p/children")" 2>/dev/null || true; fi
        stop "$1" TERM 5
    else
        stop "$1" "${2:-TERM}" 5
    fi
}
listed() { (IFS=,; echo "$*"); }
ready() { # NAME...: all of them live and take jobs (sinfo would call a node that is down "completing")
    local n
    for n; do alive "$n" || return 1; done
    [ "$(scontrol -o show node "$(listed "$@")" 2>/dev/null | grep -cE ' State=(IDLE|MIXED|ALLOCATED)(\+PLANNED)? ')" = $# ]
}
await_nodes() { # NAME...: a node that was declared down, by hand or after a crash, comes back
    local end=$((SECONDS + 60))
    until ready "$@"; do
        [ $SECONDS -lt $end ] || { sinfo -N -l >&2; die "nodes not ready, see $LOG"; }
        scontrol -Q update nodename="$(listed "$@")" state=resume >/dev/null 2>&1 || true
        sleep 0.2
    done
}

#!/usr/bin/env bash
# Stop the cluster that up.sh started: exactly its processes. --purge removes its state too (job ids start at 1 again).
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in '' | --purge) ;; *) die "usage: down.sh [--purge]" ;; esac
[ -d "$RUN/pids" ] || { say "nothing at $DIR"; exit 0; }
lock

# jobs first, so that tasks end through slurmd
queued() { timeout 5 squeue -h -o %A 2>/dev/null | sort -u; }
if alive slurmctld; then
    queued | xargs -r timeout 5 scancel -f 2>/dev/null || true
    for _ in $(seq 50); do
        [ -n "$(queued)" ] || break
        sleep 0.1
    done
fi
stop slurmctld TERM 10
for record in "$RUN"/pids/n[0-9]*; do
    [ ! -e "$record" ] || stop_node "${record##*/}" &
done
wait
stop slurmdbd TERM 5
stop mariadb TERM 10
stop munged TERM 2

# what the daemons left behind (slurmstepd of nodes without namespaces) carries the mark in its environment
{ grep -lzxF "C2G_SLURM_MARK=$DIR" /proc/[0-9]*/environ 2>/dev/null || true; } | while IFS=/ read -r _ _ pid _; do
    kill -KILL "$pid" 2>/dev/null || true
done

if [ "$(readlink /etc/slurm/slurm.conf)" = "$SLURM_CONF" ]; then rm -f /etc/slurm/slurm.conf; fi
edit_hosts
if [ "${1:-}" = --purge ]; then
    rm -rf "${DIR:?}"/{etc,run,log,bin,spool,state,dev,mysql,env.sh,lock}
    rmdir --ignore-fail-on-non-empty "$DIR"
fi
say "down ($DIR)"

#!/usr/bin/env bash
# node.sh kill NAME...    a power cut: slurmd, slurmstepd and tasks die at once, and Slurm is told
# node.sh down NAME...    declared down while it lives: its jobs are killed and requeued
# node.sh resume NAME...  started where it does not live, and back in service when this returns
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -ge 2 ] || die "usage: node.sh kill|down|resume NAME..."
verb=$1
shift
[ -f "$SLURM_CONF" ] || die "nothing at $DIR: up.sh first"
for n; do grep -q "^NodeName=$n " "$SLURM_CONF" || die "no node $n at $DIR"; done
lock
case $verb in
    kill)
        for n; do stop_node "$n" KILL; done
        scontrol update nodename="$(listed "$@")" state=down reason=killed
        ;;
    down) scontrol update nodename="$(listed "$@")" state=down reason=declared ;;
    resume)
        for n; do start_node "$n"; done
        await_nodes "$@"
        ;;
    *) die "usage: node.sh kill|down|resume NAME..." ;;
esac

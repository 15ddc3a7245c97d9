#!/usr/bin/env bash
# ctld.sh restart [--kill]: stop slurmctld (TERM: it saves its state; --kill: it cannot), start it, wait until it answers.
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case $* in
    restart) signal=TERM ;;
    "restart --kill") signal=KILL ;;
    *) die "usage: ctld.sh restart [--kill]" ;;
esac
[ -f "$SLURM_CONF" ] || die "nothing at $DIR: up.sh first"
lock
stop slurmctld $signal 10
start_controller

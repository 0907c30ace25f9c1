#!/usr/bin/env bash
# Runs a command again as long as its exit code says that the same command resumes the run. One on each host, where no
# scheduler starts processes again (launch/tpu_vm.sh):
#   launch/restart.sh .venv/bin/pretrain train --gin_file=F --workdir=RUN
# `pretrain run` is for several processes on one machine, and does not see other hosts.
# SIGTERM to this script is passed on, and the command is not started again.
set -uo pipefail
max_restarts=${MAX_RESTARTS:-100}

resumes() {  # whether the same command resumes the run after this exit code
  case $1 in
    0) return 1 ;;                  # done
    70|72|74|75) return 0 ;;        # hang, back before a loss spike, wrong values, interrupted
    64|65|66|71) return 1 ;;        # config, data, checkpoint, not finite: a restart would find the same
    *) return 0 ;;                  # killed, crashed, another process died
  esac
}

stopped= child=
trap 'stopped=1; [[ -n $child ]] && kill -TERM "$child"' TERM INT
for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  [[ -n $stopped ]] && kill -TERM "$child"  # the signal came before the number of the child was known
  wait "$child"
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends `wait` early
  wait "$child"; code=$?  # the command's own code, also where it ended while the signal was handled
  if [[ -n $stopped ]] || ! resumes "$code" || ((restart >= max_restarts)); then
    echo "restart.sh: exit code $code after $restart restarts" >&2
    exit "$code"
  fi
  echo "restart.sh: exit code $code; restart $((restart + 1)) of $max_restarts" >&2
  sleep "${PAUSE_SECONDS:-5}"
done

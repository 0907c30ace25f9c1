#!/usr/bin/env bash
# A run on the VMs of a Cloud TPU slice, without Kubernetes: gcloud alone. From the folder of the repository:
#   WORKDIR=gs://BUCKET/RUN NAME=pretrain ZONE=us-east5-a TYPE=v5p-256 launch/tpu_vm.sh up configs/ul2/20b.gin
#   launch/tpu_vm.sh [--dry_run] [ACTION] CONFIG.gin [--gin.KEY=VALUE …]
# Actions:
#   up      create (or queue), copy, train, tail: the default
#   create  makes the VMs; with QUEUE=1 asks for them and waits; SPOT=1 makes them preemptible
#   copy    copies the committed files to each VM and installs them
#   train   starts the command on all VMs; launch/restart.sh starts it again while it resumes
#   tail    shows the log of the first VM
#   resume  copy and train, for VMs that were made again after a preemption; the run resumes from WORKDIR
#   stop    SIGTERM on all VMs: the run saves and ends with 75
#   delete  deletes the VMs, and the request of QUEUE=1; the run in WORKDIR stays
# --dry_run prints the commands, one a line, and runs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
die() { printf 'tpu_vm.sh: %s\n' "$*" >&2; exit 64; }

dry_run=
[[ ${1:-} == --dry_run ]] && { dry_run=1; shift; }
action=up
case ${1:-} in up|create|copy|train|tail|resume|stop|delete) action=$1; shift ;; esac
config=${1:-}
[[ -n $config ]] || die 'no config; write launch/tpu_vm.sh [--dry_run] [ACTION] CONFIG.gin.'
[[ -f $config ]] || die "$config does not exist; name a .gin file, or an action: up create copy train tail resume stop delete."
shift

name=${NAME:-pretrain} zone=${ZONE:-us-east5-a} type=${TYPE:-v5p-256} version=${VERSION:-v2-alpha-tpuv5}
workdir=${WORKDIR:-gs://BUCKET/RUN}
[[ -n $dry_run || $workdir != gs://BUCKET/RUN ]] || die 'WORKDIR is not set; all VMs write there: WORKDIR=gs://BUCKET/RUN.'
where=("$name" "--zone=$zone")
spot=(); [[ ${SPOT:-} == 1 ]] && spot=(--spot)

run() {  # runs a command, or prints it so that a shell would read the same words
  if [[ -z $dry_run ]]; then "$@"; return; fi
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[][A-Za-z0-9_./:=@%+,{}-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

on() {  # on WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
  if [[ ${QUEUE:-} != 1 ]]; then
    run gcloud compute tpus tpu-vm create "${where[@]}" "--accelerator-type=$type" "--version=$version" "${spot[@]}"
    return
  fi
  run gcloud compute tpus queued-resources create "${where[@]}" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$version" "${spot[@]}"
  local state
  while state=$(run gcloud compute tpus queued-resources describe "${where[@]}" '--format=value(state.state)'); do
    if [[ -n $dry_run ]]; then echo "$state"; return; fi
    case $state in
      ACTIVE) return ;;
      FAILED|SUSPENDED) die "the request for $name is $state; delete it, and create it again." ;;
    esac
    sleep 60
  done
}

copy() {
  run mkdir -p build
  run git archive --format=tar.gz --output=build/pretrain.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp build/pretrain.tar.gz "$name:" "--zone=$zone" --worker=all
  # The images have Python 3.10; uv brings 3.11. The extra adds libtpu to the locked packages.
  on all 'mkdir -p pretrain && tar -xzf pretrain.tar.gz -C pretrain && cd pretrain && export PATH=$HOME/.local/bin:$PATH && (command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh) && uv python install 3.11 && PYTHON=$(uv python find 3.11) ./scripts/setup.sh && uv pip install --python .venv/bin/python --no-build-isolation -e ".[tpu]"'
}

train() {
  local flags
  flags=$(printf ' %q' "--gin_file=$config" "--workdir=$workdir" "$@")
  on all "cd pretrain || exit; nohup launch/restart.sh .venv/bin/pretrain train$flags >>train.log 2>&1 </dev/null & echo \$! >train.pid"
}

tail_log() { on 0 'tail -n 50 -F pretrain/train.log'; }
stop() { on all 'kill -TERM $(cat pretrain/train.pid)'; }

delete() {
  if [[ ${QUEUE:-} == 1 ]]; then run gcloud compute tpus queued-resources delete "${where[@]}" --force --quiet; return; fi
  run gcloud compute tpus tpu-vm delete "${where[@]}" --quiet
}

case $action in
  up) create; copy; train "$@"; tail_log ;;
  create) create ;;
  copy) copy ;;
  train) train "$@" ;;
  tail) tail_log ;;
  resume) copy; train "$@" ;;
  stop) stop ;;
  delete) delete ;;
esac
if [[ -n $dry_run && $action == up ]]; then
  echo '# after a preemption: create, then resume'
  train "$@"
  echo '# to end the run early, and at the end'
  stop
  delete
fi

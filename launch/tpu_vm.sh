#!/usr/bin/env bash
# Trains one run, or a study, on every worker of a Cloud TPU VM slice, detached: it goes on without this terminal.
#
#   launch/tpu_vm.sh create [--spot] [--runtime VERSION] NAME ZONE TYPE     asks for a slice (a queued resource)
#   launch/tpu_vm.sh run NAME ZONE [study] CONFIG [ARGS...]                 installs this checkout there and starts
#   launch/tpu_vm.sh attach NAME ZONE                                       follows the log of worker 0
#   launch/tpu_vm.sh status NAME ZONE                                       prints what became of each worker's process
#   launch/tpu_vm.sh stop NAME ZONE                                         asks all processes to stop, with a checkpoint
#   launch/tpu_vm.sh delete NAME ZONE                                       gives the slice back
#   launch/tpu_vm.sh keep [--spot] [--runtime VERSION] [--restarts K] [--poll SECONDS]
#     NAME ZONE TYPE [study] CONFIG [ARGS...]                               does all of it until the run is done
#
# With --dry-run each prints the commands that it would run. ARGS are as for `tiedjax train` or `tiedjax study`. CONFIG
# is relative to the root of the checkout; what is committed (HEAD) is what runs. --out must be on a disk that all
# workers mount, or in an object store. The workers need Python 3.11 or newer; PYTHON names it there (default:
# python3). The same command continues the run.
#
# `keep` creates the slice if there is none, and again when it was pre-empted. It starts the run again after exit
# statuses 75 and 76, after a signal killed a process, and after a worker lost its process: at most K times (50 unless
# told otherwise), not counting new slices. It ends when all processes have ended with exit status 0, when one has ended
# with any other, and after `stop`. It passes that exit status on and leaves the slice there: `delete` gives it back.
# Ending `keep` itself leaves the run running.
set -euo pipefail

readonly AGAIN=75 STALLED=76 # exit statuses after which the same command may succeed
readonly ROOT_ON_WORKER=tiedjax

subcommand=${1:-}
case $subcommand in
  create) form="[--spot] [--runtime VERSION] NAME ZONE TYPE" ;;
  run) form="NAME ZONE [study] CONFIG [ARGS...]" ;;
  attach | status | stop | delete) form="NAME ZONE" ;;
  keep)
    form="[--spot] [--runtime VERSION] [--restarts K] [--poll SECONDS] NAME ZONE TYPE [study] CONFIG [ARGS...]"
    ;;
  *)
    echo "launch/tpu_vm.sh: '$subcommand' is not a command;" \
      "usage: launch/tpu_vm.sh create | run | attach | status | stop | delete | keep [--dry-run] ..." >&2
    exit 2
    ;;
esac

usage_error() {
  echo "launch/tpu_vm.sh: $1; usage: launch/tpu_vm.sh $subcommand [--dry-run] $form" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "${@:2}"; do
  if [[ $argument == --dry-run ]]; then dry_run=1; else arguments+=("$argument"); fi
done
spot=() runtime='' restarts=50 poll=60
while [[ ${arguments[0]:-} == --* ]]; do
  option=${arguments[0]} value=${arguments[1]:-}
  [[ $form == *"[$option"[]\ ]* ]] || usage_error "$option is not an option"
  case $option in
    --spot)
      spot=(--spot)
      arguments=("${arguments[@]:1}")
      continue
      ;;
    --runtime) runtime=$value ;;
    --restarts) restarts=$value ;;
    --poll) poll=$value ;;
  esac
  [[ $value ]] || usage_error "$option is without its value"
  arguments=("${arguments[@]:2}")
done
[[ $restarts =~ ^(0|[1-9][0-9]{0,3})$ ]] || usage_error "K must be a number of restarts, got '$restarts'"
[[ $poll =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "SECONDS must be a number of seconds, got '$poll'"

wanted=() # the words of the form that are in capitals and not in brackets
for word in $form; do [[ $word == *[!A-Z]* ]] || wanted+=("$word"); done
((${#arguments[@]} >= ${#wanted[@]})) || usage_error "one of ${wanted[*]} is missing"
[[ $form == *ARGS* ]] || ((${#arguments[@]} == ${#wanted[@]})) ||
  usage_error "'${arguments[${#wanted[@]}]}' is too much"
name=${arguments[0]} zone=${arguments[1]}
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  usage_error "NAME must be of small letters, digits and hyphens, got '$name'"
arguments=("${arguments[@]:2}")
if [[ $form == *TYPE* ]]; then
  type=${arguments[0]}
  arguments=("${arguments[@]:1}")
  case $type in
    v2-* | v3-* | v4-*) runtime=${runtime:-tpu-ubuntu2204-base} ;;
    v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
    v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
    v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
  esac
  [[ $runtime ]] || usage_error "the runtime version of '$type' is not known, give it with --runtime"
fi
if [[ $form == *CONFIG* ]]; then
  [[ ${arguments[0]} == study ]] || arguments=(train "${arguments[@]}")
  ((${#arguments[@]} >= 2)) || usage_error "CONFIG is missing"
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

step() { # prints a command, and runs it unless this is a dry run
  {
    printf '%q ' "$@"
    echo
  } >&3
  [[ $dry_run ]] || "$@"
}
exec 3>&1 # where commands are printed, also by a step whose own output is read

quote() { # its arguments as one line for the shell of the workers
  local line
  line=$(printf '%q ' "$@")
  printf '%s' "${line% }"
}

on_workers() { # runs a line on worker $1, or on all of them
  step gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

queue_state() { # prints the state of the queued resource, nothing if there is none
  step gcloud compute tpus queued-resources list --zone="$zone" \
    --filter="name ~ (^|/)$name\$" --format="value(state.state)"
}

create() {
  step gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"}
}

delete() { # with its slice
  step gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
}

pack() { # what is committed now is what every slice gets
  archive=tiedjax.tar.gz
  if [[ ! $dry_run ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    archive=$scratch/tiedjax.tar.gz
  fi
  step git -C "$root" archive --format=tar.gz --output="$archive" HEAD
}

install() {
  step gcloud compute tpus tpu-vm scp "$archive" "$name:tiedjax.tar.gz" --zone="$zone" --worker=all || return 1
  on_workers all "$(
    quote mkdir -p "$ROOT_ON_WORKER"
  ) && $(
    quote tar -xzf tiedjax.tar.gz -C "$ROOT_ON_WORKER"
  ) && cd $ROOT_ON_WORKER && $(
    quote "${PYTHON:-python3}" -m venv .venv
  ) && $(
    quote .venv/bin/pip install --quiet '.[tpu,gcs]'
  )"
}

start() {
  on_workers all "$(quote bash "$ROOT_ON_WORKER/launch/worker.sh" start "${arguments[@]}")"
}

stop() {
  on_workers all "$(quote bash "$ROOT_ON_WORKER/launch/worker.sh" stop)"
}

end() { # ends what is left of a run some of whose processes have ended
  on_workers all "$(quote bash "$ROOT_ON_WORKER/launch/worker.sh" end)"
}

status() { # prints a line for each worker
  local script=$ROOT_ON_WORKER/launch/worker.sh
  on_workers all "if [ -e $script ]; then bash $script status; else echo 'status: none'; fi"
}

say() {
  echo "launch/tpu_vm.sh: $1" >&2
}

give_up() { # says why, and ends with an exit status
  say "$1"
  exit "$2"
}

restarted=0 # how often the run was started again
late=       # whether some processes had ended and others had not when they were last looked at

attend() { # looks at the processes of a slice that is there, and does what is to be done
  local answers words code failed=0 reason
  answers=$(status) || return 0 # a worker that does not answer may be about to be pre-empted
  words=$(sed -n 's/^.*status: //p' <<<"$answers" | sort -u)
  [[ $words ]] || return 0
  if [[ $words == running ]]; then
    late=
    return 0
  elif [[ $words == *running* ]]; then
    [[ ! $late ]] || end || true
    late=1
    return 0
  fi
  late=
  if [[ $words == none ]]; then
    { install && start; } || say "starting failed; it is tried again"
    return 0
  fi
  while read -r code; do
    # The one that a signal killed comes first: the others may have failed because of it.
    if ((code > 128 || code && (failed == 0 || failed == AGAIN || failed == STALLED))); then failed=$code; fi
  done < <(sed -nE 's/^(ended|stopped) //p' <<<"$words")
  reason="exit status $failed"
  if [[ $words == *stopped* ]]; then
    give_up "stopped; $reason" "$failed"
  elif [[ $words == *lost* || $words == *none* ]]; then
    reason="a worker lost its process"
  elif ((failed != AGAIN && failed != STALLED && failed <= 128)); then
    give_up "$reason" "$failed"
  fi
  ((restarted < restarts)) || give_up "$reason after $restarts restarts" "$((failed ? failed : 1))"
  restarted=$((restarted + 1))
  say "$reason; restart $restarted of $restarts"
  [[ $words != *none* ]] || install || return 0
  start || say "starting failed; it is tried again"
}

keep() {
  local state answered=
  pack
  while true; do
    state=$(queue_state) || state=unknown
    if [[ $state == unknown && ! $answered ]]; then exit 1; fi
    case $state in
      ACTIVE) attend ;;
      '') create || [[ $answered ]] || exit 1 ;;
      SUSPENDED)
        say "$name was pre-empted; it is created again"
        delete && create || true
        ;;
      FAILED) give_up "the request for $name failed" 1 ;;
    esac
    answered=1
    sleep "$poll"
  done
}

case $subcommand in
  run)
    pack
    install
    start
    ;;
  attach) on_workers 0 "$(quote bash "$ROOT_ON_WORKER/launch/worker.sh" follow)" ;;
  keep)
    if [[ $dry_run ]]; then
      queue_state
      create
      pack
      install
      start
      status
      delete
    else
      keep
    fi
    ;;
  *) "$subcommand" ;;
esac

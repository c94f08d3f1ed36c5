#!/usr/bin/env bash
# Runs `tiedjax` on one worker, detached from whoever started it. launch/tpu_vm.sh calls this on the workers of a slice.
#
#   launch/worker.sh start COMMAND [ARGS...]    starts .venv/bin/tiedjax COMMAND [ARGS...] of this checkout
#   launch/worker.sh status                     prints `status: none`, `running`, `ended N`, `stopped N` or `lost`
#   launch/worker.sh follow                     prints the end of its log and what is added until it ends
#   launch/worker.sh stop                       asks it to stop, with a checkpoint; kills it after two minutes
#   launch/worker.sh end                        does that where the processes of other workers have ended already
#
# `ended N` is an exit status, `stopped N` that of one that a person stopped; `lost` is a process that ended without one, as when the
# machine was started anew. The folder .detached of the checkout holds its log, process id and exit status.
set -euo pipefail

readonly PATIENCE=120 # seconds between asking the process to stop and killing it
readonly USAGE="usage: launch/worker.sh start COMMAND [ARGS...] | status | follow | stop | end"

usage_error() {
  echo "launch/worker.sh: $1; $USAGE" >&2
  exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly state=.detached

running() { # whether the process lives: its number may be another one's by now
  [[ -s $state/pid ]] && grep -aqE 'tiedjax|worker\.sh' "/proc/$(<"$state/pid")/cmdline" 2>/dev/null
}

start() {
  mkdir -p "$state"
  if running; then
    echo "launch/worker.sh: it is running already" >&2
    exit 1
  fi
  rm -f "$state/pid" "$state/status" "$state/asked"
  setsid bash launch/worker.sh run "$@" </dev/null >>"$state/log" 2>&1 &
  until [[ -s $state/pid ]]; do sleep 0.1; done
}

run() { # the detached part, which outlives tiedjax and writes its exit status
  local status
  .venv/bin/tiedjax "$@" &
  echo "$!" >"$state/pid"
  wait "$!" && status=0 || status=$?
  echo "$status" >"$state/status"
}

print_status() {
  local word=ended
  if [[ ! -s $state/pid ]]; then
    word=none
  elif running; then
    word=running
  else
    [[ -s $state/status ]] || sleep 1 # it may be about to be written
    [[ ! -e $state/asked ]] || word=stopped
    if [[ -s $state/status ]]; then word="$word $(<"$state/status")"; else word=lost; fi
  fi
  echo "status: $word"
}

end() {
  local tenths
  if running; then
    kill -s TERM "$(<"$state/pid")" || true
    for ((tenths = 0; tenths < 10 * PATIENCE; tenths++)); do
      running || break
      sleep 0.1
    done
    ! running || kill -s KILL "$(<"$state/pid")" || true
  fi
  print_status
}

case ${1:-} in
  start | run)
    (($# >= 2)) || usage_error "COMMAND is missing"
    if [[ $1 == start ]]; then start "${@:2}"; else run "${@:2}"; fi
    ;;
  status) print_status ;;
  follow)
    [[ -s $state/pid ]] || usage_error "nothing was started here"
    exec tail -n 100 --follow --pid="$(<"$state/pid")" "$state/log"
    ;;
  stop)
    [[ ! -e $state ]] || touch "$state/asked" # it may have ended a moment ago, and be about to be started again
    end
    ;;
  end) end ;;
  *) usage_error "'${1:-}' is not a command" ;;
esac

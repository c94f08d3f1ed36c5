#!/usr/bin/env bash
# Trains one run, or every run of a study, with N processes of this machine as one cluster.
#
#   launch/local.sh [--dry-run] N [study] CONFIG [ARGS...]      ARGS: as for `tiedjax train` or `tiedjax study`
#
# Process 0 prints as usual, the others to standard error with their number in front. The first process that fails ends
# the others, and its exit status is passed on. SIGTERM or Ctrl-C asks all of them to stop after the same step, with a
# checkpoint (exit status 143); a second one ends them at once. The same command continues the run.
set -euo pipefail

readonly PATIENCE=60 # seconds between asking a process to stop and killing it

usage_error() {
  echo "launch/local.sh: $1; usage: launch/local.sh [--dry-run] N [study] CONFIG [ARGS...]" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "$@"; do
  [[ ! $argument =~ (^|[=:])([A-Za-z][A-Za-z0-9+.-]+):// ]] ||
    usage_error "paths must be on a disk, got the ${BASH_REMATCH[2]}:// address '$argument'"
  if [[ $argument == --dry-run ]]; then dry_run=1; else arguments+=("$argument"); fi
done
((${#arguments[@]} >= 2)) || usage_error "N and CONFIG are missing"
processes=${arguments[0]}
arguments=("${arguments[@]:1}")
[[ $processes =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "N must be a number of processes, got '$processes'"
[[ ${arguments[0]} == study ]] || arguments=(train "${arguments[@]}")
((${#arguments[@]} >= 2)) || usage_error "CONFIG is missing"

# A port that nobody listens on, below those that the system hands out by itself.
port=
for ((attempt = 0; attempt < 100; attempt++)); do
  port=$((20000 + RANDOM % 12000))
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
done

pids=()
stopping=
deadline=
request_stop() { # asks all processes to stop; asked again, kills them
  local signal=TERM
  [[ -z $stopping ]] || signal=KILL
  stopping=1
  deadline=$((SECONDS + PATIENCE))
  ((${#pids[@]} == 0)) || kill -s "$signal" "${pids[@]}" 2>/dev/null || true
}

for ((i = 0; i < processes; i++)); do
  command=(tiedjax "${arguments[@]}"
    --coordinator "127.0.0.1:$port" --processes "$processes" --process-id "$i")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
  elif ((i == 0)); then
    trap request_stop INT TERM
    "${command[@]}" &
    pids+=("$!")
  else
    # sed outlives the signal that asks the process to stop: its last words matter.
    "${command[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /" >&2) 2>&1 &
    pids+=("$!")
  fi
done

status=0
while ((${#pids[@]})); do
  running=" $(jobs -rp | tr '\n' ' ')"
  left=()
  for pid in "${pids[@]}"; do
    if [[ $running == *" $pid "* ]]; then
      left+=("$pid")
    else
      wait "$pid" && code=0 || code=$?
      ((status)) || status=$code
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  if ((status)) && [[ ! $stopping ]]; then request_stop; fi
  if [[ $stopping ]] && ((SECONDS >= deadline)); then request_stop; fi
  ((${#pids[@]} == 0)) || sleep 0.1 || true
done
exit "$status"

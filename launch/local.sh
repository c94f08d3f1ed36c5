#!/usr/bin/env bash
# Trains one run, or every run of a study, with N processes of this machine as one cluster.
#
#   launch/local.sh [--restarts K] [--dry-run] N [study] CONFIG [ARGS...]
#
# ARGS are as for `tiedjax train` or `tiedjax study`. Process 0 prints as usual, the others to standard error with their
# number in front. The first process that fails ends the others, and its exit status is passed on. SIGTERM, SIGHUP,
# SIGUSR1 or Ctrl-C asks all of them to stop after the same step, with a checkpoint (exit status 75); a second one ends
# them at once. The same command continues the run.
#
# With --restarts K all processes are started again, at most K times, after exit status 75 (unless this launcher was
# asked to stop), after 76 (stalled), and after a signal killed a process. No other exit status starts them again.
set -euo pipefail

readonly PATIENCE=60         # seconds between asking a process to stop and killing it
readonly STOPPED_PATIENCE=5  # seconds for which a process may be stopped (SIGSTOP) once another has failed
readonly AGAIN=75 STALLED=76 # exit statuses after which the same command may succeed

usage_error() {
  echo "launch/local.sh: $1; usage: launch/local.sh [--restarts K] [--dry-run] N [study] CONFIG [ARGS...]" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then dry_run=1; else arguments+=("$argument"); fi
done
restarts=0
if [[ ${arguments[0]:-} == --restarts ]]; then
  restarts=${arguments[1]:-}
  [[ $restarts =~ ^(0|[1-9][0-9]{0,3})$ ]] || usage_error "K must be a number of restarts, got '$restarts'"
  arguments=("${arguments[@]:2}")
fi
((${#arguments[@]} >= 2)) || usage_error "N and CONFIG are missing"
processes=${arguments[0]}
arguments=("${arguments[@]:1}")
[[ $processes =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "N must be a number of processes, got '$processes'"
[[ ${arguments[0]} == study ]] || arguments=(train "${arguments[@]}")
((${#arguments[@]} >= 2)) || usage_error "CONFIG is missing"

free_port() { # prints a port that nobody listens on, below those that the system hands out by itself
  local attempt port
  for ((attempt = 0; attempt < 100; attempt++)); do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

pids=()       # of the processes that run
starting=     # whether some of them are yet to be started
asked=        # whether this launcher was asked to stop
stopping=     # whether the processes were asked to stop
deadline=     # when they are killed
stopped_at=() # by pid: since when a process has been stopped

request_stop() { # asks all processes to stop; asked again, kills them
  local signal=TERM
  [[ -z $stopping ]] || signal=KILL
  stopping=1
  deadline=$((SECONDS + PATIENCE))
  ((${#pids[@]} == 0)) || kill -s "$signal" "${pids[@]}" 2>/dev/null || true
}

# shellcheck disable=SC2329 # it is called by a trap
hear_request() {
  asked=1
  [[ $starting ]] || request_stop
}

start_process() { # process $1, at the coordinator $2
  local command=(tiedjax "${arguments[@]}" --coordinator "$2" --processes "$processes" --process-id "$1")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
  elif (($1 == 0)); then
    "${command[@]}" &
    pids+=("$!")
  else
    # sed outlives the signal that asks the process to stop: its last words matter.
    "${command[@]}" > >(trap '' INT TERM HUP USR1 && exec sed -u "s/^/[$1] /" >&2) 2>&1 &
    pids+=("$!")
  fi
}

kill_stopped() { # kills the processes that have been stopped for too long: they cannot hear that they are to end
  local pid
  for pid in "${pids[@]}"; do
    if [[ $(ps -o stat= -p "$pid" 2>/dev/null) != T* ]]; then
      unset "stopped_at[$pid]"
    elif ((SECONDS - ${stopped_at[$pid]:=$SECONDS} >= STOPPED_PATIENCE)); then
      kill -s KILL "$pid" 2>/dev/null || true
    fi
  done
}

# Waits for all processes. Sets `status`: that of the first that failed, and of several that are found together that of
# one that a signal killed, since the others may have failed because of it.
wait_for_all() {
  local running left pid code failed looked=
  status=0
  while ((${#pids[@]})); do
    running=" $(jobs -rp | tr '\n' ' ')"
    left=() failed=0
    for pid in "${pids[@]}"; do
      if [[ $running == *" $pid "* ]]; then
        left+=("$pid")
      else
        wait "$pid" && code=0 || code=$?
        if ((code > 128 && failed <= 128 || failed == 0)); then failed=$code; fi
      fi
    done
    pids=(${left[@]+"${left[@]}"})
    ((status)) || status=$failed
    if ((status)) && [[ ! $stopping ]]; then request_stop; fi
    if [[ $stopping ]] && ((SECONDS >= deadline)); then request_stop; fi
    ((${#pids[@]})) || break
    if ((status)) && [[ $looked != "$SECONDS" ]]; then
      looked=$SECONDS
      kill_stopped
    fi
    sleep 0.1 || true
  done
}

if [[ ! $dry_run ]]; then trap hear_request INT TERM HUP USR1; fi
for ((restart = 0; ; )); do
  starting=1 stopping='' stopped_at=()
  coordinator=127.0.0.1:$(free_port)
  for ((i = 0; i < processes; i++)); do start_process "$i" "$coordinator"; done
  starting=
  [[ ! $asked ]] || request_stop
  wait_for_all
  if [[ $asked ]] || ((restart >= restarts)); then break; fi
  ((status == AGAIN || status == STALLED || status > 128)) || break
  restart=$((restart + 1))
  echo "launch/local.sh: exit status $status; restart $restart of $restarts" >&2
done
exit "$status"

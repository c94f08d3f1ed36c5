#!/usr/bin/env bash
# Installs this checkout on every worker of a Cloud TPU VM slice and trains one run, or a study, there.
#
#   launch/tpu_vm.sh [--dry-run] NAME ZONE [study] CONFIG [ARGS...]     ARGS: as for `tiedjax train` or `tiedjax study`
#
# CONFIG is relative to the root of the checkout; what is committed (HEAD) is what runs. --out must be on a disk that
# all workers mount. The workers need Python 3.11 or newer; PYTHON names it there (default: python3). The same command
# continues the run.
set -euo pipefail

usage_error() {
  echo "launch/tpu_vm.sh: $1; usage: launch/tpu_vm.sh [--dry-run] NAME ZONE [study] CONFIG [ARGS...]" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "$@"; do
  [[ ! $argument =~ (^|[=:])([A-Za-z][A-Za-z0-9+.-]+):// ]] ||
    usage_error "paths must be on a disk, got the ${BASH_REMATCH[2]}:// address '$argument'"
  if [[ $argument == --dry-run ]]; then dry_run=1; else arguments+=("$argument"); fi
done
((${#arguments[@]} >= 3)) || usage_error "NAME, ZONE and CONFIG are needed"
name=${arguments[0]} zone=${arguments[1]}
arguments=("${arguments[@]:2}")
[[ ${arguments[0]} == study ]] || arguments=(train "${arguments[@]}")
((${#arguments[@]} >= 2)) || usage_error "CONFIG is missing"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run() { # prints a command, and runs it unless this is a dry run
  printf '%q ' "$@"
  echo
  [[ $dry_run ]] || "$@"
}

quote() { # its arguments as one line for the shell of the workers
  local line
  line=$(printf '%q ' "$@")
  printf '%s' "${line% }"
}

archive=tiedjax.tar.gz
if [[ ! $dry_run ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  archive=$scratch/tiedjax.tar.gz
fi

run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:tiedjax.tar.gz" --zone="$zone" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$(
  quote mkdir -p tiedjax
) && $(
  quote tar -xzf tiedjax.tar.gz -C tiedjax
) && cd tiedjax && $(
  quote "${PYTHON:-python3}" -m venv .venv
) && $(
  quote .venv/bin/pip install --quiet '.[tpu]'
)"
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="cd tiedjax && $(
  quote .venv/bin/tiedjax "${arguments[@]}"
)"

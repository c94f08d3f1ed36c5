#!/usr/bin/env bash
# Trains one run, or a study, on Google Kubernetes Engine, as a JobSet of one worker for each TPU host or GPU node.
#
#   launch/gke.sh --image IMAGE [--claim CLAIM] --tpu TYPE:TOPOLOGY [--chips N] [--slices N] [--restarts K] [--spot]
#     NAME [study] CONFIG [ARGS...]
#   launch/gke.sh --image IMAGE [--claim CLAIM] --gpu TYPE:COUNT [--workers N] [--restarts K] [--spot]
#     NAME [study] CONFIG [ARGS...]
#
# ARGS are as for `tiedjax train` or `tiedjax study`. IMAGE is made by launch/Containerfile. CLAIM is a
# PersistentVolumeClaim that all workers can mount and write (ReadWriteMany); it is mounted at /runs, where --out should
# be unless that is in an object store. TYPE is the node pool's accelerator, such as tpu-v5p-slice:4x4x4 or
# nvidia-h100-80gb:8. A TPU host has N chips (4 unless told otherwise), a GPU node COUNT GPUs. The cluster needs JobSet.
#
# All workers start again, at most K times (50 unless told otherwise), after exit statuses 75 and 76 and when a node is
# lost; the JobSet fails after 1, 2, 77, 78 and 79. With --dry-run the manifest is printed and not applied. A JobSet
# that has ended is deleted before the same command continues its run: kubectl delete jobset NAME.
set -euo pipefail

usage_error() {
  echo "launch/gke.sh: $1; usage: launch/gke.sh [--dry-run] --image IMAGE [--claim CLAIM]" \
    "(--tpu TYPE:TOPOLOGY [--chips N] [--slices N] | --gpu TYPE:COUNT [--workers N]) [--restarts K] [--spot]" \
    "NAME [study] CONFIG [ARGS...]" >&2
  exit 2
}

dry_run=
arguments=()
for argument in "$@"; do
  [[ $argument != *[[:cntrl:]]* ]] || usage_error "an argument has a line break or another control character"
  if [[ $argument == --dry-run ]]; then dry_run=1; else arguments+=("$argument"); fi
done
image='' claim='' tpu='' gpu='' chips='' slices='' workers='' restarts=50
only=' ' # the words of `# only: WORD` that are kept
while [[ ${arguments[0]:-} == --* ]]; do
  option=${arguments[0]} value=${arguments[1]:-}
  case $option in
    --spot)
      only+='spot '
      arguments=("${arguments[@]:1}")
      continue
      ;;
    --image) image=$value ;;
    --claim) claim=$value ;;
    --tpu) tpu=$value ;;
    --gpu) gpu=$value ;;
    --chips) chips=$value ;;
    --slices) slices=$value ;;
    --workers) workers=$value ;;
    --restarts) restarts=$value ;;
    *) usage_error "$option is not an option" ;;
  esac
  [[ $value ]] || usage_error "$option is without its value"
  arguments=("${arguments[@]:2}")
done
for number in "--chips:$chips" "--slices:$slices" "--workers:$workers"; do
  [[ ${number#*:} =~ ^([1-9][0-9]{0,3})?$ ]] || usage_error "${number%%:*} must be a number, got '${number#*:}'"
done
[[ $restarts =~ ^(0|[1-9][0-9]{0,3})$ ]] || usage_error "K must be a number of restarts, got '$restarts'"
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || usage_error "--image must name an image, got '$image'"
if [[ $claim ]]; then
  only+='claim mounts '
  [[ $claim =~ ^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$ ]] || usage_error "--claim must name a claim, got '$claim'"
fi

# What follows from the accelerator: `workers` of each slice, with `chips` each.
if [[ $tpu && $gpu || ! $tpu && ! $gpu ]]; then usage_error "one of --tpu and --gpu is needed"; fi
if [[ $tpu ]]; then
  only+='tpu '
  [[ $tpu =~ ^([a-z0-9-]+):([1-9][0-9]{0,3})x([1-9][0-9]{0,3})(x([1-9][0-9]{0,3}))?$ ]] ||
    usage_error "--tpu must be TYPE:TOPOLOGY, got '$tpu'"
  type=${tpu%%:*} topology=${tpu#*:}
  chips=${chips:-4} slices=${slices:-1}
  all=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
  ((all % chips == 0)) || usage_error "$topology is $all chips, which hosts of $chips do not divide"
  [[ ! $workers ]] || usage_error "--workers goes with --gpu"
  workers=$((all / chips))
else
  only+='gpu mounts '
  [[ $gpu =~ ^([a-z0-9-]+):([1-9][0-9]{0,2})$ ]] || usage_error "--gpu must be TYPE:COUNT, got '$gpu'"
  type=${gpu%%:*} topology=''
  [[ ! $chips && ! $slices ]] || usage_error "--chips and --slices go with --tpu"
  chips=${gpu#*:} slices=1 workers=${workers:-1}
fi

((${#arguments[@]} >= 2)) || usage_error "NAME and CONFIG are needed"
name=${arguments[0]}
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  usage_error "NAME must be of at most 40 small letters, digits and hyphens, got '$name'"
arguments=("${arguments[@]:1}")
[[ ${arguments[0]} == study ]] || arguments=(train "${arguments[@]}")
((${#arguments[@]} >= 2)) || usage_error "CONFIG is missing"

fill() { # puts the value $2 in the place of ${$1} wherever `line` has it
  local filled=''
  while [[ $line == *"\${$1}"* ]]; do
    filled+=${line%%"\${$1}"*}$2
    line=${line#*"\${$1}"}
  done
  line=$filled$line
}

literal() { # a string of YAML that is the argument itself in a container: Kubernetes reads $$ as $
  local text=${1//'$'/'$$'}
  printf "'%s'" "${text//\'/\'\'}"
}

render() {
  local line
  while IFS= read -r line; do
    [[ $line != '#'* ]] || continue
    if [[ $line == *' # only: '* ]]; then
      [[ $only == *" ${line##* } "* ]] || continue
      line=${line%' # only: '*}
    fi
    if [[ $line == *"\${argument}"* ]]; then
      for argument in "${arguments[@]}"; do
        printf '%s%s\n' "${line%%"\${argument}"*}" "$(literal "$argument")"
      done
      continue
    fi
    fill name "$name" && fill image "$image" && fill claim "$claim" && fill restarts "$restarts"
    fill type "$type" && fill topology "$topology" && fill chips "$chips"
    fill slices "$slices" && fill workers "$workers"
    printf '%s\n' "$line"
  done <"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml.template"
}

if [[ $dry_run ]]; then
  echo "# kubectl apply --filename=-"
  render
else
  render | kubectl apply --filename=-
fi

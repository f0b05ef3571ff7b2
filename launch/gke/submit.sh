#!/usr/bin/env bash
# HELP
# Trains on GKE: fills in launch/gke/jobset.yaml and creates the JobSet.
#
#   launch/gke/submit.sh --name NAME --image IMAGE DEVICES [OPTIONS] -- TRAINER FLAGS
#
#   DEVICES  --tpu v5e|v5p|v6e --topology 16x16 [--slices N] [--chips-per-node 1|4|8]
#        or  --gpu nvidia-h100-80gb --nodes N [--gpus-per-node 8]
#
#   --spot                 on spot machines; --reservation NAME: on reserved ones
#   --data-bucket BUCKET   mounted at /data, read-only: --config.data.source=/data/datasets/web
#   --service-account KSA  Kubernetes service account that may use the buckets
#   --env NAME=VALUE       for the trainer; repeatable
#   --max-restarts N       after preemptions and failures; 100
#   --namespace NAMESPACE  default
#   --dry-run              prints the manifest, and creates nothing
#
#   launch/gke/submit.sh --name first --image us-docker.pkg.dev/my-project/topklm/topklm:1 --tpu v5e --topology 16x16 \
#       --slices 2 --spot --data-bucket my-bucket --service-account trainer \
#       -- --config=configs/paper.py:1.4b --config.data.source=/data/datasets/web --workdir=gs://my-bucket/runs/first
# END
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$repository/launch/common.sh"

name='' image='' tpu='' topology='' slices=1 chips_per_node='' gpu='' nodes='' gpus_per_node=8 spot=no reservation=''
data_bucket='' service_account='' variables=() max_restarts=100 namespace=default dry_run=no rest=()
switches='--spot --dry-run'
port=8476

main() {
  read_options "$@"
  check
  local manifest
  manifest=$(render)
  if [ "$dry_run" = yes ]; then
    say "$manifest"
    return
  fi
  say "$manifest" | kubectl create --namespace="$namespace" --filename=- || {
    say "not created; a JobSet of this name that is over: kubectl delete jobset $name --namespace=$namespace" >&2
    exit 1
  }
  local selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
  say "follow it:  kubectl logs --namespace=$namespace --follow --selector=$selector"
  say "its state:  kubectl get jobset $name --namespace=$namespace"
  say "end it, saved (submitting it again resumes):  kubectl delete jobset $name --namespace=$namespace"
}

# --- the manifest ---

render() {
  text=$(cat "$repository/launch/gke/jobset.yaml")
  fill NAME "$name"
  fill IMAGE "$(json "$image")"
  fill MAX_RESTARTS "$max_restarts"
  fill ARGS "$(json_list "${rest[@]}")"
  fill_or_drop SERVICE_ACCOUNT "$service_account"
  if [ -n "$tpu" ]; then render_tpu; else render_gpu; fi
  if [ -n "$data_bucket" ]; then
    fill GCSFUSE '"true"'
    fill DATA_MOUNT '{name: data, mountPath: /data, readOnly: true}'
    fill DATA_VOLUME "{name: data, csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true, \
volumeAttributes: {bucketName: $data_bucket}}}"
  else
    drop GCSFUSE
    text=${text//"
          metadata:
            annotations:
          spec:"/"
          spec:"}
    drop DATA_MOUNT
    drop DATA_VOLUME
  fi
  say "$text"
}

render_tpu() {
  local selector
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology"
  fill EXCLUSIVE cloud.google.com/gke-nodepool
  fill GROUP slice
  fill REPLICAS "$slices"
  fill PODS "$((chips / chips_per_node))"
  fill RESOURCE google.com/tpu
  fill DEVICES "$chips_per_node"
  fill_placement "$selector"
  fill_environment
}

# Nobody tells GPU pods their place; a TPU slice's know it from GKE.
render_gpu() {
  local path="metadata.annotations['batch.kubernetes.io/job-completion-index']"
  local index="{name: TOPKLM_PROCESS_ID, valueFrom: {fieldRef: {fieldPath: \"$path\"}}}"
  text=${text/"
  annotations:
    # A TPU slice is a node pool: no two Jobs share one.
    alpha.jobset.sigs.k8s.io/exclusive-topology: @EXCLUSIVE@"/}
  fill GROUP host
  fill REPLICAS 1
  fill PODS "$nodes"
  fill RESOURCE nvidia.com/gpu
  fill DEVICES "$gpus_per_node"
  fill_placement "cloud.google.com/gke-accelerator: $gpu"
  fill_environment "$index" "{name: TOPKLM_COORDINATOR, value: \"$name-host-0-0.$name:$port\"}" \
    "{name: TOPKLM_PROCESS_COUNT, value: \"$nodes\"}"
}

fill_placement() {
  local selector=$1 indent='
              '
  [ "$spot" = no ] || selector+="${indent}cloud.google.com/gke-spot: \"true\""
  [ -z "$reservation" ] || selector+="${indent}cloud.google.com/reservation-name: $reservation"
  fill SELECTOR "$selector"
  if [ "$spot" = yes ]; then
    fill SPOT_TOLERATION '{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  else
    drop SPOT_TOLERATION
  fi
}

# Of ready-made entries and --env.
fill_environment() {
  local entries=("$@") variable entry list='{name: PYTHONUNBUFFERED, value: "1"}'
  for variable in ${variables[@]+"${variables[@]}"}; do
    entries+=("{name: ${variable%%=*}, value: $(json "$(escaped "${variable#*=}")")}")
  done
  for entry in ${entries[@]+"${entries[@]}"}; do
    list+="
              - $entry"
  done
  fill ENV "$list"
}

fill() {
  text=${text//"@$1@"/"$2"}
}

# Removes the line of a place that stays empty.
drop() {
  text=$(grep -v "@$1@" <<<"$text")
}

fill_or_drop() {
  if [ -n "$2" ]; then fill "$1" "$2"; else drop "$1"; fi
}

json_list() {
  local word list='' separator=''
  for word in "$@"; do
    list+="$separator$(json "$(escaped "$word")")"
    separator=', '
  done
  say "[$list]"
}

# Kubernetes replaces $(NAME) in arguments and variables, and takes $$ for a dollar.
escaped() {
  local dollars='$$'
  printf %s "${1//'$'/$dollars}"
}

# A string as JSON has it, which is also YAML; without at signs, which might look like a place to fill in.
json() {
  local word=$1
  word=${word//$'\\'/$'\\\\'}
  word=${word//'"'/$'\\"'}
  word=${word//$'\n'/$'\\n'}
  word=${word//$'\t'/$'\\t'}
  word=${word//@/$'\\u0040'}
  printf '"%s"' "$word"
}

# --- the command line ---

take_word() {
  mistake "$1: the trainer's flags come after --; see launch/gke/submit.sh --help"
}

take_option() {
  case $1 in
    --env) variables+=("$2") ;;
    --name | --image | --tpu | --topology | --slices | --chips-per-node | --gpu | --nodes | --gpus-per-node | --spot | \
      --reservation | --data-bucket | --service-account | --max-restarts | --namespace | --dry-run)
      set_option "$1" "$2"
      ;;
    *) mistake "$1: no such option; the trainer's flags come after --; see launch/gke/submit.sh --help" ;;
  esac
}

check() {
  local variable
  # A pod's name adds to it, and has 63 characters at most.
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    mistake "--name ${name:-missing}: must be a-z, 0-9 and -, 40 at most, beginning with a letter"
  [[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] ||
    mistake "--image ${image:-missing}: must be the name of a container image"
  is_count "$max_restarts" || mistake "--max-restarts $max_restarts: must be 1 or more"
  [[ $namespace =~ ^[a-z0-9-]+$ ]] || mistake "--namespace $namespace: must be a-z, 0-9 and -"
  for variable in "$service_account" "$data_bucket" "$reservation" "$gpu"; do
    [[ $variable =~ ^[A-Za-z0-9._-]*$ ]] || mistake "$variable: must be a name, of letters, digits, . _ and -"
  done
  for variable in ${variables[@]+"${variables[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || mistake "--env $variable: must be NAME=VALUE"
  done
  [ "$spot" = no ] || [ -z "$reservation" ] || mistake "--spot and --reservation: choose one"
  check_devices
  check_flags
}

check_devices() {
  case $tpu,$gpu in
    ,) mistake "no devices: --tpu v5e --topology 16x16, or --gpu nvidia-h100-80gb --nodes 2" ;;
    ?*,?*) mistake "--tpu and --gpu: choose one" ;;
    ?*,) check_tpu ;;
    *)
      [ -z "$topology$chips_per_node" ] && [ "$slices" = 1 ] ||
        mistake "--topology, --slices, --chips-per-node: are for --tpu"
      is_count "$nodes" || mistake "--nodes ${nodes:-missing}: must be 1 or more"
      is_count "$gpus_per_node" || mistake "--gpus-per-node $gpus_per_node: must be 1 or more"
      ;;
  esac
}

check_tpu() {
  local side
  local flat='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
  [ -z "$nodes" ] || mistake "--nodes: is for --gpu; a TPU's topology says how many there are"
  is_count "$slices" || mistake "--slices $slices: must be 1 or more"
  case $tpu in
    v5e | v6e)
      accelerator='tpu-v6e-slice'
      [ "$tpu" = v6e ] || accelerator='tpu-v5-lite-podslice'
      case " $flat " in
        *" ${topology:-missing} "*) ;;
        *) mistake "--topology ${topology:-missing}: $tpu has $flat" ;;
      esac
      ;;
    v5p)
      accelerator='tpu-v5p-slice'
      [[ $topology =~ ^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$ ]] ||
        mistake "--topology ${topology:-missing}: v5p has AxBxC, e.g. 4x4x8"
      ;;
    *) mistake "--tpu $tpu: must be v5e, v5p or v6e" ;;
  esac
  chips=1
  for side in ${topology//x/ }; do
    chips=$((chips * side))
  done
  [ -n "$chips_per_node" ] || chips_per_node=$((chips < 4 ? chips : 4))
  case $chips_per_node in
    1 | 4 | 8) ;;
    *) mistake "--chips-per-node $chips_per_node: must be 1, 4 or 8, as the node pool's machines have it" ;;
  esac
  [ $((chips % chips_per_node)) -eq 0 ] ||
    mistake "--topology $topology: $chips chips are no whole number of machines with $chips_per_node"
  [ "$chips_per_node" -eq 4 ] || [ "$chips" -eq "$chips_per_node" ] ||
    mistake "--chips-per-node $chips_per_node: slices of several machines have 4 in each"
}

check_flags() {
  local flag workdir=''
  [ "${#rest[@]}" -gt 0 ] ||
    mistake "no trainer flags: give them after --, e.g. -- --config=configs/paper.py:1.4b --workdir=gs://..."
  for flag in "${rest[@]}"; do
    case $flag in --workdir=*) workdir=${flag#--workdir=} ;; esac
  done
  # A pod's disk is gone with the pod.
  [[ $workdir == gs://* ]] ||
    mistake "--workdir=${workdir:-missing}: must be in a bucket, gs://BUCKET/FOLDER, written with ="
}

main "$@"

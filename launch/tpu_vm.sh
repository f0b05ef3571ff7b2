#!/usr/bin/env bash
# HELP
# Trains on a TPU pod (slice, or several): Cloud TPU VMs from queued resources.
#
#   launch/tpu_vm.sh VERB NAME [OPTIONS] [-- TRAINER FLAGS or COMMAND]
#
#   create     asks for the TPU and waits until it is there
#              --type TYPE          v5litepod-256, v5p-128, v6e-64, ...
#              --slices N           several slices, joined by the data-centre network; 1
#              --spot, --reserved   instead of on demand
#              --runtime VERSION    software of the VMs; found from TYPE
#              --create-flag FLAG   one more for gcloud, e.g. --create-flag=--service-account=...; repeatable
#   setup      copies this working tree to all workers and installs it
#              --clone URL          clones URL there instead, at --commit SHA (this working tree's)
#              --extras LIST        of pyproject.toml; tpu,gcs
#              --then COMMAND       run in the repository on every worker afterwards: fetch or mount data
#   run        starts training on all workers, detached; refuses where some training runs already
#              --env NAME=VALUE     for the trainer; repeatable
#   babysit    create, setup and run as needed, and again after every preemption or failure, until training is
#              finished (exit code 0); options of the three, and
#              --max-failures N     in a row without a new highest step, before it gives up; 5
#   logs       follows the workers' logs; --worker W, --slice S, --lines N (20), --once: without following
#   status     of the TPU, its slices and the training on all workers
#   ssh        a shell on one worker, or COMMAND there; --worker W (0, or all), --slice S (0)
#   stop       SIGTERM to training, which saves and ends; waits for that; --kill: at once, unsaved
#   delete     gives the TPU back; --yes: without asking
#
# All verbs take --zone, --project (gcloud's own settings otherwise), --internal-ips (workers without external
# addresses; this machine is in their network), --help, and --dry-run, which prints the commands and runs nothing;
# it has to be told --slices.
# TOPKLM_POLL_SECONDS (60) is the time between looks at the cloud.
#
#   launch/tpu_vm.sh create pod --type v5litepod-256 --spot --zone us-west4-a
#   launch/tpu_vm.sh setup pod --zone us-west4-a --then 'gcloud storage cp -r gs://my-bucket/datasets/web datasets/'
#   launch/tpu_vm.sh run pod --zone us-west4-a -- --config=configs/paper.py:1.4b --workdir=gs://my-bucket/runs/first
#   launch/tpu_vm.sh logs pod --zone us-west4-a --worker 0
#   launch/tpu_vm.sh delete pod --zone us-west4-a
#
# Exit codes: 0; 1 for what went wrong in the cloud; 2 for a mistake of yours, also if the trainer found it.
# END
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$repository/launch/common.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_cloud.sh
. "$repository/launch/tpu_cloud.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_babysit.sh
. "$repository/launch/tpu_babysit.sh"

poll_seconds=${TOPKLM_POLL_SECONDS:-60}
polls_between_reports=10
most_silent_polls=10 # of workers that do not answer, or outlive the failure of others
tries=3         # of what a lost connection may break
worker_script=topklm/launch/tpu_worker.sh
silence='not all workers answer: see above'

verb='' name=''
zone='' project='' internal_ips=no dry_run=no
type='' slices=1 spot=no reserved=no runtime='' create_flags=()
clone='' commit='' extras=tpu,gcs then_command=''
variables=() max_failures=5
worker='' slice='' lines=20 once=no
kill=no yes=no
rest=() has_rest=no
switches='--spot --reserved --internal-ips --dry-run --once --kill --yes'

main() {
  parse "$@"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "verb_$verb"
}

# --- verbs ---

verb_create() {
  check_create_options
  request_tpu || exit 1
  [ "$dry_run" = no ] || {
    say "# every $poll_seconds s until it prints ACTIVE:"
    print_command gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  }
  wait_until_active || exit 1
}

verb_setup() {
  check_setup_options
  pack_source
  if [ "$dry_run" = no ]; then
    retry ask_workers || fail "$silence"
    [ "$(count running)" -eq 0 ] || mistake "training runs on $name: stop it before setting up again"
  fi
  set_up || exit 1
}

verb_run() {
  check_run_options
  if [ "$dry_run" = no ]; then
    retry ask_workers || fail "$silence"
    [ "$(count unprepared)" -eq 0 ] || mistake "$name is not set up: launch/tpu_vm.sh setup $name"
    [ "$(count running)" -eq 0 ] ||
      mistake "training runs on $name already: follow it with launch/tpu_vm.sh logs $name, or end it with stop"
  fi
  start_training || exit 1
  [ "$dry_run" = yes ] || say "$name: training has started; follow it with launch/tpu_vm.sh logs $name"
}

verb_logs() {
  local mode=follow number pids=() pid
  [ "$once" = no ] || mode=once
  find_nodes || exit 1
  check_slice
  if [ -n "$slice" ] || [ "${#nodes[@]}" -eq 1 ]; then
    print_log "${slice:-0}" "$mode"
    return
  fi
  # Each in a group of its own, so that Ctrl-C can end gcloud together with the ssh that it runs.
  trap 'for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null; done; exit 130' INT TERM
  for number in "${!nodes[@]}"; do
    if [ "$dry_run" = yes ]; then
      print_log "$number" "$mode"
      continue
    fi
    set -m
    print_log "$number" "$mode" </dev/null &
    set +m
    pids+=($!)
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid"
  done
}

# SLICE MODE
print_log() {
  local label='worker '
  [ "${#nodes[@]}" -eq 1 ] || label="slice $1 worker "
  ssh_to "${nodes[$1]}" "${worker:-all}" "$(quoted bash "$worker_script" log "$label" "$lines" "$2")"
}

check_slice() {
  [ "${slice:-0}" -lt "${#nodes[@]}" ] || mistake "--slice $slice: $name has slices 0 to $((${#nodes[@]} - 1))"
}

verb_status() {
  local node state
  if [ "$dry_run" = yes ]; then
    print_command gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    find_nodes
    for node in "${nodes[@]}"; do
      print_command gcloud compute tpus tpu-vm describe "$node" "${where[@]}" '--format=value(state,health)'
    done
    on_all_workers "bash $worker_script status"
    return
  fi
  look
  say "$name: $tpu_state"
  explain_state
  [ "$tpu_state" = ACTIVE ] || return 0
  find_nodes || exit 1
  for node in "${nodes[@]}"; do
    state=$(gcloud compute tpus tpu-vm describe "$node" "${where[@]}" '--format=value(state,health)') ||
      state='no answer'
    say "$node: $(echo "$state" | tr '\t' ' ')"
  done
  retry ask_workers || fail "$silence"
  sort "$scratch/workers" | awk '{
    line = $2 ": " $3
    if ($4 != "-") line = line " with exit code " $4
    if ($6 != "-") line = line ", step " $5
    print line
  }'
}

verb_ssh() {
  find_nodes || exit 1
  check_slice
  local node=${nodes[${slice:-0}]}
  if [ "${#rest[@]}" -eq 0 ]; then
    [ "${worker:-0}" != all ] || mistake "--worker all: needs a command after --"
    run_or_print gcloud compute tpus tpu-vm ssh "$node" --worker="${worker:-0}" "${where[@]}" \
      ${network[@]+"${network[@]}"}
  else
    # One word is a line for the shell there; several are a command and its arguments.
    local command=${rest[0]}
    [ "${#rest[@]}" -eq 1 ] || command=$(quoted "${rest[@]}")
    ssh_to "$node" "${worker:-0}" "$command"
  fi
}

verb_stop() {
  local signal=stop waited=0
  [ "$kill" = no ] || signal='kill'
  retry on_all_workers "if [ -e $worker_script ]; then bash $worker_script $signal; fi" || fail "$silence"
  [ "$dry_run" = no ] || return 0
  while :; do
    retry ask_workers || fail "$silence"
    [ "$(count running)" -gt 0 ] || break
    [ $((waited % polls_between_reports)) -ne 0 ] || say "$name: $(count running) workers save and end"
    waited=$((waited + 1))
    pause
  done
  say "$name: no training runs"
}

verb_delete() {
  local answer
  if [ "$yes" = no ] && [ "$dry_run" = no ]; then
    read -r -p "Delete $name and everything on the disks of its workers? [y/N] " answer || true
    case $answer in
      y | Y | yes) ;;
      *) fail "$name is not deleted; --yes deletes without asking" ;;
    esac
  fi
  delete_tpu
}

verb_babysit() {
  check_create_options
  check_setup_options
  check_run_options
  pack_source
  if [ "$dry_run" = yes ]; then
    request_tpu
    set_up
    start_training
    say "# every $poll_seconds s until training is finished:"
    verb_status
    return
  fi
  babysit
}

# --- what run and babysit share ---

pack_source() {
  if [ -n "$clone" ]; then
    [ -n "$commit" ] || commit=$(git -C "$repository" rev-parse HEAD)
    revision=$commit
    return
  fi
  revision=$(git -C "$repository" describe --always --dirty 2>/dev/null) ||
    fail "$repository is no git working tree, so what to copy is not known: use --clone URL --commit SHA"
  if [ "$dry_run" = yes ]; then
    say "# tracked and new files of $repository, without ignored ones, become $scratch/topklm.tar.gz"
    return
  fi
  # git also lists files that are deleted.
  git -C "$repository" ls-files -z --cached --others --exclude-standard |
    (cd "$repository" && while IFS= read -r -d '' file; do
      if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done) |
    COPYFILE_DISABLE=1 tar -C "$repository" --null -T - -czf "$scratch/topklm.tar.gz"
}

set_up() {
  local fetch='mkdir topklm.new && tar -xzf topklm.tar.gz -C topklm.new'
  if [ -n "$clone" ]; then
    fetch="git clone --quiet $(quoted "$clone") topklm.new"
    fetch+=" && git -C topklm.new checkout --quiet --detach $(quoted "$commit")"
  else
    retry copy_to_all_workers "$scratch/topklm.tar.gz" topklm.tar.gz || return 1
  fi
  retry on_all_workers "rm -rf topklm.new && $fetch && echo $(quoted "$revision") > topklm.new/REVISION && \
rm -rf topklm && mv topklm.new topklm && bash $worker_script install $(quoted "$extras" "$then_command")"
}

start_training() {
  local attempt
  attempt=$(date +%s)-$$
  if ! retry on_all_workers "bash $worker_script start $attempt $(trainer_command)"; then
    say "$name: not all workers could start; ending those that did"
    on_all_workers "bash $worker_script abandon $attempt" || true
    return 1
  fi
}

trainer_command() {
  quoted ${variables[@]+"${variables[@]}"} -- "${rest[@]}"
}

# As tpu_worker.sh computes it.
command_sum() {
  trainer_command | cksum | tr ' ' -
}

# --- the command line ---

parse() {
  [ "$#" -gt 0 ] || mistake "no verb: see launch/tpu_vm.sh --help"
  case $1 in
    -h | --help | help)
      show_help "$0"
      exit 0
      ;;
    create | setup | run | babysit | logs | status | ssh | stop | delete) verb=$1 ;;
    *) mistake "$1: no verb; there are create, setup, run, babysit, logs, status, ssh, stop and delete" ;;
  esac
  shift
  read_options "$@"
  check_common_options
}

take_word() {
  [ -z "$name" ] || mistake "$1: one name is enough; what is for the trainer comes after --"
  name=$1
}

take_option() {
  local allowed='--zone --project --internal-ips --dry-run --slices'
  local create='--type --spot --reserved --runtime --create-flag' setup='--clone --commit --extras --then'
  case $verb in
    create) allowed+=" $create" ;;
    setup) allowed+=" $setup" ;;
    run) allowed+=' --env' ;;
    babysit) allowed+=" $create $setup --env --max-failures" ;;
    logs) allowed+=' --worker --slice --lines --once' ;;
    ssh) allowed+=' --worker --slice' ;;
    stop) allowed+=' --kill' ;;
    delete) allowed+=' --yes' ;;
  esac
  [[ " $allowed " == *" $1 "* ]] || mistake "$1: no option of $verb; it takes $allowed"
  case $1 in
    --create-flag)
      [[ $2 == --?* ]] || mistake "--create-flag $2: must be one flag of gcloud, written --flag=value"
      create_flags+=("$2")
      ;;
    --env) variables+=("$2") ;;
    --then) then_command=$2 ;;
    *) set_option "$1" "$2" ;;
  esac
}

check_common_options() {
  case $name in
    '') mistake "$verb: needs the TPU's name" ;;
    [!a-z]* | *[!a-z0-9-]* | *-) mistake "$name: a name has a-z, 0-9 and -, and begins with a letter" ;;
  esac
  is_count "$slices" || mistake "--slices $slices: must be 1 or more"
  is_count "$lines" || mistake "--lines $lines: must be 1 or more"
  case $worker in
    all) ;;
    *[!0-9]*) mistake "--worker $worker: must be a number, or all" ;;
  esac
  case $slice in
    *[!0-9]*) mistake "--slice $slice: must be a number" ;;
  esac
  case $verb in
    run | babysit | ssh) ;;
    *) [ "$has_rest" = no ] || mistake "--: $verb takes nothing after it" ;;
  esac
  where=(--quiet)
  [ -z "$zone" ] || where+=(--zone="$zone")
  [ -z "$project" ] || where+=(--project="$project")
  network=()
  [ "$internal_ips" = no ] || network=(--internal-ip)
}

check_create_options() {
  case $type in
    '') mistake "--type: missing; e.g. --type v5litepod-256" ;;
    v4-[1-9]*) default_runtime=tpu-ubuntu2204-base ;;
    v5litepod-[1-9]*) default_runtime=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) default_runtime=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) default_runtime=v2-alpha-tpuv6e ;;
    *)
      [ -n "$runtime" ] ||
        mistake "--type $type: not one of v4-N, v5litepod-N, v5p-N, v6e-N; another needs --runtime too"
      ;;
  esac
  runtime=${runtime:-$default_runtime}
  [ "$spot$reserved" != yesyes ] || mistake "--spot and --reserved: choose one"
}

check_setup_options() {
  [ -z "$commit" ] || [ -n "$clone" ] || mistake "--commit $commit: needs --clone URL"
  case $extras in
    *[!a-z0-9,-]*) mistake "--extras $extras: must be names from pyproject.toml with commas between them" ;;
  esac
}

check_run_options() {
  local variable
  [ "${#rest[@]}" -gt 0 ] ||
    mistake "$verb: needs the trainer's flags after --, e.g. -- --config=configs/small.py --workdir=gs://..."
  is_count "$max_failures" || mistake "--max-failures $max_failures: must be 1 or more"
  for variable in ${variables[@]+"${variables[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || mistake "--env $variable: must be NAME=VALUE"
  done
}

main "$@"

# shellcheck shell=bash disable=SC2154 # tpu_vm.sh sets the options, and sources this
# The TPU and its workers as gcloud shows them: ask for one, look at it, run a command on all of its workers.

request_tpu() {
  local options=(--accelerator-type="$type" --runtime-version="$runtime" "${where[@]}")
  if [ "$slices" -eq 1 ]; then
    options+=(--node-id="$name")
  else
    options+=(--node-count="$slices" --node-prefix="$name")
  fi
  [ "$spot" = no ] || options+=(--spot)
  [ "$reserved" = no ] || options+=(--reserved)
  [ "$internal_ips" = no ] || options+=(--internal-ips)
  run_or_print gcloud compute tpus queued-resources create "$name" "${options[@]}" \
    ${create_flags[@]+"${create_flags[@]}"}
}

delete_tpu() {
  run_or_print gcloud compute tpus queued-resources delete "$name" --force "${where[@]}"
}

wait_until_active() {
  local polls=0 before='' began=$SECONDS
  while :; do
    look
    if [ "$tpu_state" != "$before" ] || [ $((polls % polls_between_reports)) -eq 0 ]; then
      say "$name: $tpu_state, waited $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
    fi
    before=$tpu_state
    case $tpu_state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | MISSING)
        explain_state
        return 1
        ;;
    esac
    polls=$((polls + 1))
    pause
  done
}

# Sets `tpu_state`: what the cloud says, MISSING if there is none of this name, UNKNOWN if nobody answers.
look() {
  if tpu_state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    '--format=value(state.state)' 2>"$scratch/look"); then
    [ -n "$tpu_state" ] || tpu_state=UNKNOWN
  elif grep -q NOT_FOUND "$scratch/look"; then
    tpu_state=MISSING
  else
    tpu_state=UNKNOWN
    sed 's/^/gcloud: /' "$scratch/look" >&2
  fi
}

explain_state() {
  case $tpu_state in
    FAILED)
      say "$name: FAILED means that the request could not be met: an option that does not fit the zone, a quota," \
        "or no capacity in time:"
      gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        '--format=value(state.failedData.error.message)' || true
      ;;
    SUSPENDED)
      say "$name: SUSPENDED means that its machines were taken back (preempted, or maintenance) and are gone;" \
        "the request has to be deleted and made again"
      ;;
    SUSPENDING) say "$name: SUSPENDING means that its machines are being taken back" ;;
    DELETING) say "$name: it is being deleted" ;;
    MISSING) say "$name: there is no such TPU in this zone and project" ;;
    UNKNOWN) say "$name: gcloud gave no answer, see above" ;;
  esac
}

# Sets `nodes`, the slices' names.
find_nodes() {
  local found i
  nodes=("$name")
  if [ "$dry_run" = yes ]; then
    [ "$slices" -eq 1 ] || for ((i = 0; i < slices; i++)); do nodes[i]=$name-$i; done
    return
  fi
  found=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--flatten=tpu.nodeSpec[]' \
    '--format=value(tpu.nodeSpec.nodeId)') || return 1
  # shellcheck disable=SC2206 # one name a line, without spaces or stars
  nodes=($found)
  [ "${#nodes[@]}" -gt 0 ] || {
    say "$name: has no slices yet" >&2
    return 1
  }
}

# --- the workers ---

# gcloud fails if the command does on any worker. A worker that vanishes shall not hang us.
ssh_to() {
  run_or_print gcloud compute tpus tpu-vm ssh "$1" --worker="$2" "${where[@]}" ${network[@]+"${network[@]}"} \
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 \
    --command="$3"
}

on_all_workers() {
  local node pids=() pid code=0
  find_nodes || return 1
  for node in "${nodes[@]}"; do
    if [ "$dry_run" = yes ]; then
      ssh_to "$node" all "$1"
    else
      ssh_to "$node" all "$1" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || code=$?
  done
  return "$code"
}

copy_to_all_workers() {
  local node
  find_nodes || return 1
  for node in "${nodes[@]}"; do
    run_or_print gcloud compute tpus tpu-vm scp "$1" "$node:$2" --worker=all "${where[@]}" \
      ${network[@]+"${network[@]}"} || return 1
  done
}

# Leaves a line for each worker in $scratch/workers, as tpu_worker.sh prints it.
ask_workers() {
  local unprepared="echo @topklm \$(hostname) unprepared - 0 -"
  on_all_workers "if [ -e $worker_script ]; then bash $worker_script status; else $unprepared; fi" \
    >"$scratch/answers" 2>"$scratch/complaints" || {
    sed 's/^/gcloud: /' "$scratch/complaints" >&2
    return 1
  }
  grep '^@topklm ' "$scratch/answers" >"$scratch/workers"
}

# How many workers were in a state when they were last asked.
count() {
  awk -v state="$1" '$3 == state { n++ } END { print n + 0 }' "$scratch/workers"
}

# --- small things ---

# What went wrong in the cloud: exit code 1.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

run_or_print() {
  if [ "$dry_run" = yes ]; then
    print_command "$@"
  else
    "$@"
  fi
}

print_command() {
  quoted "$@"
  echo
}

retry() {
  local i
  for ((i = 1; i < tries; i++)); do
    "$@" && return
    say "$name: that failed; trying again"
    pause
  done
  "$@"
}

pause() {
  sleep "$poll_seconds"
}

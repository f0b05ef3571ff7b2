# shellcheck shell=bash disable=SC2154 # tpu_vm.sh sets the options, and sources this
# Brings training to its end through preemptions and failures: asks for the TPU, sets it up, starts, watches.

# What it knows: `recreate`, the TPU has to be replaced; `prepared`, this TPU has been set up by us; `best`, the
# highest step seen so far; `failures` in a row without a higher one.
recreate=no prepared=no best=0 failures=0 ever_active=no

babysit() {
  trap 'say "$name: not watched any more; training goes on, and the same command watches it again"; exit 130' INT
  while :; do
    if ! bring_up; then
      [ "$ever_active" = yes ] || fail "$name cannot be created; nothing to wait for"
      note_failure "the TPU could not be created"
    elif ! retry ask_workers; then
      ever_active=yes
      note_failure "the workers do not answer"
    else
      ever_active=yes
      if is_under_way || prepare_and_start; then
        watch_training
      fi
      act_on_verdict
    fi
  done
}

# Returns where there is something left to do.
act_on_verdict() {
  case $verdict in
    finished)
      say "$name: training is finished; give the TPU back with launch/tpu_vm.sh delete $name"
      exit 0
      ;;
    stopped)
      say "$name: stopped by launch/tpu_vm.sh stop; the same command goes on"
      exit 0
      ;;
    mistake)
      show_last_lines
      mistake "the trainer ended with exit code $EXIT_USER_ERROR, so starting it again would not help: see above"
      ;;
    gone)
      say "$name: $reason; asking for another TPU, where training resumes from its last checkpoint"
      recreate=yes
      ;;
    failed) note_failure "$reason" ;;
  esac
}

# Leaves an active TPU; recreates one that is lost.
bring_up() {
  local waited=0
  while :; do
    look
    case $tpu_state in
      ACTIVE) [ "$recreate" = yes ] || return 0 ;;
      MISSING)
        prepared=no recreate=no
        request_tpu || return 1
        wait_until_active || return 1
        return 0
        ;;
      SUSPENDED | FAILED)
        explain_state
        recreate=yes
        ;;
      *) # on its way up or down, or gcloud does not know
        [ "$tpu_state" != UNKNOWN ] || [ "$waited" -lt "$most_silent_polls" ] || return 1
        [ $((waited % polls_between_reports)) -ne 0 ] || say "$name: $tpu_state"
        waited=$((waited + 1))
        pause
        continue
        ;;
    esac
    delete_tpu || pause
  done
}

# Whether the same training runs already: babysitting was interrupted.
is_under_way() {
  [ "$(count running)" -gt 0 ] || return 1
  if awk -v sum="$(command_sum)" '$3 == "running" && $6 != sum { n++ } END { exit !n }' "$scratch/workers"; then
    mistake "other training runs on $name: end it with launch/tpu_vm.sh stop $name, or watch it with its own command"
  fi
  say "$name: training runs already; watching it"
  prepared=yes
}

prepare_and_start() {
  verdict=failed
  if [ "$prepared" = no ]; then
    reason='the workers could not be set up'
    set_up || return 1
    prepared=yes
  fi
  reason='training could not be started on all workers'
  start_training || return 1
  say "$name: training has started"
}

# Ends with `verdict` and `reason`. Training is finished when every worker's exit code is 0; a worker whose
# trainer was asked to stop before that has 75 (see outcome). That the TPU is gone is only asked of the cloud.
watch_training() {
  local silent=0 straggling=0 looks=0 total
  while :; do
    pause
    look
    case $tpu_state in
      ACTIVE) ;;
      UNKNOWN) continue ;;
      *)
        verdict=gone reason="the TPU is $tpu_state (preempted, or taken down)"
        return
        ;;
    esac
    if ! ask_workers; then
      silent=$((silent + 1))
      if slices_are_lost; then
        verdict=gone reason="a slice is $lost_state"
        return
      elif [ "$silent" -ge "$most_silent_polls" ]; then
        verdict=gone reason="workers have not answered $silent times in a row"
        return
      fi
      continue
    fi
    silent=0
    note_progress
    total=$(wc -l <"$scratch/workers")
    if [ "$(count running)" -gt 0 ]; then
      looks=$((looks + 1))
      [ $((looks % polls_between_reports)) -ne 1 ] ||
        say "$name: $(count running) of $((total)) workers train, step $best"
      [ "$(count running)" -lt "$total" ] || continue
      # Workers end by themselves when another has failed.
      straggling=$((straggling + 1))
      [ "$straggling" -ge "$most_silent_polls" ] || continue
      on_all_workers "bash $worker_script kill" || true
      verdict=failed reason="some workers ended and others did not"
      return
    fi
    judge
    return
  done
}

judge() {
  local code
  code=$(awk '{ if ($4 == "-") $4 = 1 } $4 == 2 { mistake = 1 } $4 + 0 > most { most = $4 }
    END { print mistake ? 2 : most + 0 }' "$scratch/workers")
  reason="training ended with exit code $code"
  case $code in
    0) verdict=finished ;;
    "$EXIT_USER_ERROR") verdict=mistake ;;
    *)
      verdict=failed
      [ "$(count stopped)" -eq 0 ] || verdict=stopped
      ;;
  esac
}

note_progress() {
  local step
  step=$(awk '$5 > most { most = $5 } END { print most + 0 }' "$scratch/workers")
  if [ "$step" -gt "$best" ]; then
    best=$step failures=0
  fi
}

note_failure() {
  local polls
  failures=$((failures + 1))
  if [ "$failures" -gt "$max_failures" ]; then
    [ "$tpu_state" != ACTIVE ] || show_last_lines
    say "The TPU is still yours; give it back with launch/tpu_vm.sh delete $name"
    fail "$1; given up after $failures failures in a row without a step beyond $best"
  fi
  polls=$(polls_after_failures "$failures")
  say "$name: $1; trying again in $polls x $poll_seconds s ($failures of $max_failures failures without progress)"
  while [ "$polls" -gt 0 ]; do
    pause
    polls=$((polls - 1))
  done
}

show_last_lines() {
  # shellcheck disable=SC2034 # options of verb_logs
  slice='' worker=0 lines=40 once=yes
  verb_logs || true
}

# Whether some slice will not come back by itself.
slices_are_lost() {
  local node
  find_nodes || return 1
  for node in "${nodes[@]}"; do
    lost_state=$(gcloud compute tpus tpu-vm describe "$node" "${where[@]}" '--format=value(state)' 2>/dev/null) ||
      continue
    case $lost_state in
      PREEMPTED | TERMINATED | STOPPED | DELETING | HIDDEN) return 0 ;;
    esac
  done
  return 1
}

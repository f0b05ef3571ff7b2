#!/usr/bin/env bash
# Runs the trainer within a Slurm job and queues the job again if it is not finished; launch/slurm.sh calls it.
#
#   slurm_job.sh LOG MAX_FAILURES [SRUN FLAGS...] -- TRAINER FLAGS...
#
# LOG is the file to which the job's output is appended, over all its restarts.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$repository/launch/common.sh"

others_wait_s=120 # for processes to end by themselves after one of them
first_port=61440 ports=4096

main() {
  local log=$1 max_failures=$2 srun_flags=() offset code=0 srun
  shift 2
  while [ "$1" != -- ]; do
    srun_flags+=("$1")
    shift
  done
  shift
  cd "$repository"
  # Jobs may share a node. The variable holds for all tasks, so all agree.
  export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-$((SLURM_JOB_ID % ports + first_port))}
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
  offset=$(wc -c <"$log")
  say "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}: $(quoted "$@")"
  ended_by_slurm=no asked_to_stop=no
  trap 'ended_by_slurm=yes' TERM
  trap 'asked_to_stop=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
  # In a session of its own: srun kills its tasks at once when it gets a SIGTERM that was meant for this shell.
  setsid srun --label --kill-on-bad-exit=0 --wait="$others_wait_s" ${srun_flags[@]+"${srun_flags[@]}"} \
    python -u -m topklm.main "$@" &
  srun=$!
  wait_for "$srun" || code=$?
  tail -c "+$((offset + 1))" "$log" >"$log.last"
  code=$(outcome "$code" <"$log.last")
  decide "$code" "$log" "$max_failures"
}

# Ends the job or queues it again.
decide() {
  local code=$1 log=$2 max_failures=$3 best failures step
  step=$(highest_step <"$log.last")
  rm -f "$log.last"
  case $code in
    0)
      say 'slurm: training is finished'
      rm -f "$log.failures"
      exit 0
      ;;
    "$EXIT_USER_ERROR")
      say "slurm: exit code $code, a mistake that another start would not mend: see above"
      exit "$code"
      ;;
  esac
  if [ "$asked_to_stop" = yes ]; then
    say 'slurm: stopped as asked; submitting it again goes on'
    exit 0
  elif [ "$ended_by_slurm" = yes ]; then
    say 'slurm: the job is being ended from outside; if it is preempted, Slurm queues it again'
    exit "$code"
  fi
  best=0 failures=0
  [ ! -e "$log.failures" ] || read -r best failures <"$log.failures"
  failures=$((failures + 1))
  [ "$step" -le "$best" ] || best=$step failures=1
  echo "$best $failures" >"$log.failures"
  if [ "$failures" -gt "$max_failures" ]; then
    say "slurm: exit code $code; given up after $failures starts in a row without a step beyond $best"
    exit "$code"
  fi
  say "slurm: exit code $code at step $step; queueing the job again"
  scontrol requeue "$SLURM_JOB_ID" || {
    say 'slurm: the job cannot be queued again; submit it once more to go on'
    exit "$code"
  }
}

main "$@"

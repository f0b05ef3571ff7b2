#!/usr/bin/env bash
# HELP
# Trains on GPUs of a Slurm cluster: writes a batch script and submits it.
#
#   launch/slurm.sh --nodes N --gpus-per-node G [OPTIONS] -- TRAINER FLAGS
#
#   --prelude COMMAND    run on the first node before training: load modules, activate an environment
#   --job-name NAME      topklm
#   --time LIMIT         as sbatch has it, e.g. 24:00:00; --partition P, --account A
#   --log-dir DIR        for NAME-JOB.log; slurm
#   --warn-seconds S     before the time limit training is told to save and end, and the job queues again; 300
#   --max-failures N     in a row without a new highest step, before the job ends for good; 5
#   --sbatch-flag FLAG, --srun-flag FLAG   one more, e.g. --sbatch-flag=--constraint=h100; repeatable
#   --dry-run            prints the batch script, and submits nothing
#
# One process for each GPU. The job queues itself again until training is finished, and never after exit code 2,
# a mistake of yours. To stop it for good, saved: scancel --batch --signal=USR1 JOB
#
#   launch/slurm.sh --nodes 2 --gpus-per-node 8 --time 24:00:00 --prelude 'source .venv/bin/activate' \
#       -- --config=configs/paper.py:400m --workdir=/shared/runs/first
# END
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$repository/launch/common.sh"

nodes='' gpus_per_node='' prelude='' job_name=topklm time='' partition='' account='' log_dir=slurm
warn_seconds=300 max_failures=5 sbatch_flags=() srun_flags=() dry_run=no switches=--dry-run rest=()

main() {
  read_options "$@"
  check
  if [ "$dry_run" = yes ]; then
    batch_script
    return
  fi
  mkdir -p "$log_dir"
  local job
  job=$(batch_script | sbatch --parsable)
  job=${job%%;*} # JOB;CLUSTER where there are several
  say "job $job: its log is $log_dir/$job_name-$job.log; to stop it, saved: scancel --batch --signal=USR1 $job"
}

batch_script() {
  local log="$log_dir/$job_name-%j.log" flag
  say '#!/usr/bin/env bash'
  for flag in --job-name="$job_name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" \
    --gpus-per-node="$gpus_per_node" --output="$log" --open-mode=append --requeue --signal="TERM@$warn_seconds" \
    ${time:+--time="$time"} ${partition:+--partition="$partition"} ${account:+--account="$account"} \
    ${sbatch_flags[@]+"${sbatch_flags[@]}"}; do
    say "#SBATCH $(for_sbatch "$flag")"
  done
  say "cd $(quoted "$repository") || exit $EXIT_USER_ERROR"
  [ -z "$prelude" ] || say "$prelude"
  # shellcheck disable=SC2016 # the job knows its number, not we
  say 'exec bash launch/slurm_job.sh '"$(quoted "$log_dir/$job_name-")"'"$SLURM_JOB_ID.log"' \
    "$(quoted "$max_failures" ${srun_flags[@]+"${srun_flags[@]}"} -- "${rest[@]}")"
}

# sbatch takes words apart at spaces, except between double quotes.
for_sbatch() {
  case $1 in
    *[[:space:]]*) say "${1%%=*}=\"${1#*=}\"" ;;
    *) say "$1" ;;
  esac
}

take_word() {
  mistake "$1: the trainer's flags come after --; see launch/slurm.sh --help"
}

take_option() {
  case $1 in
    --nodes | --gpus-per-node | --prelude | --job-name | --time | --partition | --account | --log-dir | \
      --warn-seconds | --max-failures | --dry-run) set_option "$1" "$2" ;;
    --sbatch-flag | --srun-flag)
      [[ $2 == --?* ]] || mistake "$1 $2: must be one flag, written --flag=value"
      if [ "$1" = --sbatch-flag ]; then sbatch_flags+=("$2"); else srun_flags+=("$2"); fi
      ;;
    *) mistake "$1: no such option; the trainer's flags come after --; see launch/slurm.sh --help" ;;
  esac
}

check() {
  is_count "$nodes" || mistake "--nodes ${nodes:-missing}: must be 1 or more"
  is_count "$gpus_per_node" || mistake "--gpus-per-node ${gpus_per_node:-missing}: must be 1 or more"
  is_count "$warn_seconds" || mistake "--warn-seconds $warn_seconds: must be 1 or more"
  is_count "$max_failures" || mistake "--max-failures $max_failures: must be 1 or more"
  case $job_name in
    *[!A-Za-z0-9._-]*) mistake "--job-name $job_name: must be letters, digits, . _ and -" ;;
  esac
  case $log_dir in
    *[%\"\\]* | *$'\n'*) mistake "--log-dir $log_dir: must be a path without % \" and \\" ;;
    /*) ;;
    *) log_dir=$PWD/$log_dir ;;
  esac
  local flag
  for flag in "$time" "$partition" "$account" ${sbatch_flags[@]+"${sbatch_flags[@]}"}; do
    case $flag in
      *\"* | *$'\n'*) mistake "$flag: sbatch flags cannot hold quotes or newlines" ;;
    esac
  done
  [ "${#rest[@]}" -gt 0 ] ||
    mistake "no trainer flags: give them after --, e.g. -- --config=configs/small.py --workdir=..."
}

main "$@"

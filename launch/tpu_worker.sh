#!/usr/bin/env bash
# Installs, starts, watches and stops the trainer on one worker of a TPU pod; launch/tpu_vm.sh runs it there.
#
#   tpu_worker.sh install EXTRAS [COMMAND]   a virtual environment with the repository that this file is in
#   tpu_worker.sh start ATTEMPT [NAME=VALUE...] -- FLAGS...
#   tpu_worker.sh status                     one line: @topklm HOST STATE EXIT_CODE STEP COMMAND_SUM
#   tpu_worker.sh stop | kill | abandon ATTEMPT
#   tpu_worker.sh log LABEL LINES follow|once
#
# STATE is none, running, ended, or lost (ended without an exit code: killed with its parent, or a reboot).
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$repository/launch/common.sh"

environment=$HOME/topklm-venv
run=$HOME/topklm-run
python_version=3.12
uv_version=0.13.9
lock_wait_s=20

main() {
  local verb=$1
  shift
  case $verb in
    install | start | supervise | status | log) "$verb" "$@" ;;
    stop) send TERM ;;
    kill) send KILL ;;
    abandon) [ "$(cat "$run/attempt" 2>/dev/null || true)" != "$1" ] || send KILL ;;
    *) mistake "$verb: not a verb of tpu_worker.sh" ;;
  esac
}

install() {
  local extras=$1 command=${2:-}
  ! is_running || mistake "training runs on $(hostname): stop it before installing"
  keep_outside datasets
  keep_outside runs
  export PATH=$HOME/.local/bin:$PATH
  # The images' own Python is too old.
  command -v uv >/dev/null || python3 -m pip install --quiet --user "uv==$uv_version"
  uv venv --quiet --allow-existing --python "$python_version" "$environment"
  uv pip install --quiet --python "$environment/bin/python" --editable "${repository}[$extras]"
  if [ -n "$command" ]; then
    cd "$repository"
    PATH=$environment/bin:$PATH bash -euo pipefail -c "$command"
  fi
  say "$(hostname): installed"
}

# A folder of the repository that installing it again does not remove.
keep_outside() {
  mkdir -p "$HOME/$1"
  ln -sfn "$HOME/$1" "$repository/$1"
}

start() {
  local attempt=$1
  shift
  [ -x "$environment/bin/python" ] || mistake "$(hostname) is not set up: run launch/tpu_vm.sh setup"
  if is_running; then
    [ "$(cat "$run/attempt")" != "$attempt" ] || return 0 # an answer was lost on its way, and this is a repetition
    mistake "training runs on $(hostname) already: follow it with logs, or end it with stop"
  fi
  mkdir -p "$run"
  rm -f "$run/exit" "$run/pid" "$run/stop"
  echo "$attempt" >"$run/attempt"
  quoted "$@" >"$run/command"
  touch "$run/log"
  wc -c <"$run/log" >"$run/offset"
  say "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) $(cat "$repository/REVISION"): $(cat "$run/command")" >>"$run/log"
  setsid nohup bash "$0" supervise "$@" </dev/null >>"$run/log" 2>&1 &
  until [ -e "$run/pid" ]; do
    kill -0 $! || break
    sleep 0.02
  done
}

# Runs the trainer to its end; the lock tells others, also after a crash of this shell, whether it lives.
supervise() {
  local variables=() code=0
  exec 9>"$run/lock"
  flock -w "$lock_wait_s" 9
  # At a shutdown everybody gets SIGTERM. Ignored signals would be inherited; handled ones are not.
  trap : TERM INT HUP
  while [ "$1" != -- ]; do
    variables+=("$1")
    shift
  done
  shift
  cd "$repository"
  env ${variables[@]+"${variables[@]}"} "$environment/bin/python" -u -m topklm.main "$@" &
  write "$run/pid" $!
  wait_for $! || code=$?
  write "$run/exit" "$(output | outcome "$code")"
}

write() {
  echo "$2" >"$1.new"
  mv "$1.new" "$1"
}

is_running() {
  [ -e "$run/lock" ] && ! flock --nonblock "$run/lock" true
}

# What the current or last attempt has printed.
output() {
  tail -c "+$(($(cat "$run/offset") + 1))" "$run/log"
}

status() {
  local state=none code=- step=0 sum=-
  if [ -e "$run/command" ]; then
    state=lost
    step=$(output | highest_step)
    sum=$(cksum <"$run/command" | tr ' ' -)
    if is_running; then
      state=running
    elif [ -e "$run/exit" ]; then
      state=ended
      code=$(cat "$run/exit")
    fi
    # Somebody asked for the end, and shall not be contradicted.
    [ "$state" != ended ] || [ ! -e "$run/stop" ] || state=stopped
  fi
  say "@topklm $(hostname) $state $code $step $sum"
}

# A second SIGTERM would end the trainer before it has saved: only who creates the mark sends one.
send() {
  is_running || return 0
  if ! (set -o noclobber && : >"$run/stop") 2>/dev/null && [ "$1" = TERM ]; then
    say "$(hostname): was asked to stop before"
    return 0
  fi
  kill -s "$1" "$(cat "$run/pid")" 2>/dev/null || true
}

log() {
  local label=$1 lines=$2 follow=()
  [ -e "$run/log" ] || mistake "$(hostname) has no log: nothing was started there"
  [ "$3" = once ] || follow=(-F)
  tail -n "$lines" ${follow[@]+"${follow[@]}"} "$run/log" | sed -u "s/^/[$label$(worker)] /"
}

# Workers are called t1v-n-0a1b2c3d-w-5, and are numbered as gcloud numbers them.
worker() {
  local host
  host=$(hostname)
  case $host in
    *-w-*) say "${host##*-w-}" ;;
    *) say "$host" ;;
  esac
}

main "$@"

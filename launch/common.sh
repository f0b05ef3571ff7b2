# shellcheck shell=bash
# What the launchers share: messages, quoting, and what the end of a training process means.
# Sourced by them; not for use by itself.

# The trainer's last line where it was asked to stop before it was finished; Slurm puts "TASK: " before lines.
STOPPED_LINE='^( *[0-9]+: )?SIG(TERM|INT): stopped .*Resume with the same command'
EXIT_USER_ERROR=2
EXIT_TRY_AGAIN=75
MOST_POLLS_BETWEEN_TRIES=20

say() {
  printf '%s\n' "$*"
}

# A mistake of the user: one line, exit code 2.
mistake() {
  printf 'error: %s\n' "$*" >&2
  exit "$EXIT_USER_ERROR"
}

# The words as a shell would read them back, on one line if none holds a newline.
quoted() {
  local word quote="'" escaped="'\\''" separator=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "%s'%s'" "$separator" "${word//$quote/$escaped}" ;;
      *) printf '%s%s' "$separator" "$word" ;;
    esac
    separator=' '
  done
}

# Prints the text between two marks at the head of a script, without the comment signs.
show_help() {
  sed -n '/^# HELP$/,/^# END$/{/^# HELP$/d;/^# END$/d;s/^# \{0,1\}//;p;}' "$1"
}

# Reads a command line: --option=value and --option value, switches (those in `switches`, without a value), other
# words, and what comes after -- into `rest`. Calls take_option NAME VALUE and take_word WORD.
# shellcheck disable=SC2034,SC2154 # the launchers set `switches` and read what this sets
read_options() {
  rest=() has_rest=no
  while [ "$#" -gt 0 ]; do
    case $1 in
      --)
        shift
        rest=("$@") has_rest=yes
        return
        ;;
      -h | --help)
        show_help "$0"
        exit 0
        ;;
      --*=?*)
        [[ " $switches " != *" ${1%%=*} "* ]] || mistake "$1: ${1%%=*} takes no value"
        take_option "${1%%=*}" "${1#*=}"
        ;;
      --*)
        if [[ " $switches " == *" $1 "* ]]; then
          take_option "$1" yes
        else
          [ -n "${2:-}" ] && [ "$2" != -- ] || mistake "$1: needs a value"
          take_option "$1" "$2"
          shift
        fi
        ;;
      *) take_word "$1" ;;
    esac
    shift
  done
}

# Sets the variable of an option: --max-failures is max_failures.
set_option() {
  local variable=${1#--}
  printf -v "${variable//-/_}" %s "$2"
}

is_count() {
  case $1 in
    '' | *[!0-9]* | 0*) return 1 ;;
  esac
}

# The exit code with which a job is over (0: finished, 2: a mistake) or to be started again (75, others), from
# that of the trainer and its output on standard input: it also exits with 0 when it was asked to stop, and saved.
outcome() {
  local stops
  stops=$(grep -cE "$STOPPED_LINE" || true)
  if [ "$1" -eq 0 ] && [ "$stops" -gt 0 ]; then
    echo "$EXIT_TRY_AGAIN"
  else
    echo "$1"
  fi
}

# The last step in the trainer's output on standard input, or 0.
highest_step() {
  sed -nE 's/^( *[0-9]+: )?step ([0-9,]+)\/.*/\2/p' | tr -d , | awk '$1 > most { most = $1 } END { print most + 0 }'
}

# Waits until a child process has ended, also while signals arrive, and returns its exit code.
wait_for() {
  local code again
  while :; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || break
  done
  # If a signal came at the very end, `code` is that of the interrupted wait; bash still knows the real one.
  again=0
  wait "$1" 2>/dev/null || again=$?
  [ "$again" -eq 127 ] || code=$again
  return "$code"
}

# How many polls to wait after so many failures in a row: 1, 2, 4, ...
polls_after_failures() {
  local polls=1 i
  for ((i = 1; i < $1; i++)); do
    polls=$((polls * 2))
    [ "$polls" -le "$MOST_POLLS_BETWEEN_TRIES" ] || polls=$MOST_POLLS_BETWEEN_TRIES
  done
  echo "$polls"
}

#!/usr/bin/env bash
# The container's first process: runs the trainer, passes SIGTERM on to it, and ends with the exit code that
# Kubernetes shall act on: 0 only if training is finished, and not if it was asked to stop and saved.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

scratch=$(mktemp -d)
mkfifo "$scratch/pipe"
tee "$scratch/output" <"$scratch/pipe" &
reader=$!
trainer=''
trap '[ -z "$trainer" ] || kill -TERM "$trainer"' TERM
python -u -m topklm.main "$@" >"$scratch/pipe" 2>&1 &
trainer=$!
code=0
wait_for "$trainer" || code=$?
trainer=''
wait_for "$reader" || true
exit "$(outcome "$code" <"$scratch/output")"

#!/usr/bin/env bash
# One `sae-jax` command on all hosts of a TPU VM slice: asks for the slice, installs the package,
# runs, asks again for a slice that was taken away, and starts again until done.
#
#   pip wheel --no-deps --wheel-dir=dist .
#   WHEEL=$(echo dist/sae_jax-*.whl) ZONE=us-east5-a TYPE=v5p-128 \
#     launch/tpu_vm.sh NAME train --workdir=gs://BUCKET/runs/a ...
#
# The first line makes the wheel of a checkout; its recipes are in it, for --config=NAME. NAME is the
# slice's. RUNTIME=v2-alpha-tpuv5 is its software version; SPOT= (empty) takes capacity
# that is not taken away. The stores and directories of the command are at gs://: the hosts share no
# disk. Needs gcloud, logged in, with a project.
#
# Ctrl-C or SIGTERM here is SIGTERM to the program, which saves. When it is done the slice is given
# back; when it was stopped, or ended with a mistake, the slice stays, and how to delete it is said.
set -euo pipefail

name=${1:?usage: ZONE=... TYPE=... launch/tpu_vm.sh NAME COMMAND...}
shift
: "${ZONE:?the zone of the slice, as ZONE=us-east5-a}"
: "${TYPE:?the accelerator type of the slice, as TYPE=v5p-128}"
: "${WHEEL:?the wheel to install there, as WHEEL=dist/sae_jax-0.2.0-py3-none-any.whl}"
spot=()
if [ -n "${SPOT-yes}" ]; then
  spot=(--spot)
fi
told_to_stop=
installed=
delete=(gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force --quiet)

stop_program='pkill -TERM -f "^[^ ]*venv/bin/python[^ ]* [^ ]*venv/bin/sae-jax"'

say() { echo "tpu_vm.sh: $*" >&2; }

if [ ! -f "$WHEEL" ]; then
  say "there is no wheel $WHEEL"
  exit 2
fi

state() { # of the request for the slice: ACTIVE when it is there
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" --zone="$ZONE" \
    --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

request() {
  gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-v2-alpha-tpuv5}" "${spot[@]}"
}

on_all_hosts() { # a command line
  gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"
}

install() {
  # The hosts' own Python is older than 3.11; uv brings one.
  gcloud compute tpus tpu-vm scp "$WHEEL" "$name:" --zone="$ZONE" --worker=all &&
    on_all_hosts "set -e
      python3 -m pip install --user --quiet uv
      ~/.local/bin/uv venv --quiet --clear --python=3.12 venv
      ~/.local/bin/uv pip install --quiet --python=venv/bin/python $(printf '%q' "./${WHEEL##*/}")'[tpu]'"
}

# shellcheck disable=SC2329 # by the trap
stop() {
  told_to_stop=yes
  heard=yes
  say 'telling the program to save and stop'
  on_all_hosts "$stop_program" || true
}
trap stop INT TERM

command=$(printf ' %q' "$@" --distributed)
while [ -z "$told_to_stop" ]; do
  case $(state) in
    ACTIVE) ;;
    ABSENT)
      request
      continue
      ;;
    FAILED | SUSPENDED) # taken away
      say 'the slice is gone; asking for another'
      "${delete[@]}"
      installed=
      continue
      ;;
    *)
      sleep 30
      continue
      ;;
  esac
  if [ -z "$installed" ]; then
    if ! install; then
      say 'could not install; trying again'
      sleep 30
      continue
    fi
    installed=yes
  fi
  # First what a lost connection may have left. In a session of its own, so that a Ctrl-C here does
  # not cut the connection before the saving.
  setsid gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all \
    --command="$stop_program && sleep 60; exec venv/bin/sae-jax$command" &
  program=$!
  heard=yes
  while [ -n "$heard" ]; do # a signal ends the wait, and not the program
    heard=
    code=0
    wait "$program" || code=$?
  done
  case $code in
    0)
      "${delete[@]}"
      exit 0
      ;;
    2 | 3) break ;; # a mistake in the input, a loss that is not finite: no use to start again
  esac
  say "the program ended with $code"
done
say "the slice stays; to give it back: ${delete[*]}"
exit "${code:-75}"

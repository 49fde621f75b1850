#!/bin/bash
# How to: bash launch/local.sh 8 CONFIG --workdir runs/a     (8 processes on this machine, one GPU each)
# Without GPUs each process gets one fake CPU device; FAKE=4 gives each four. The status is the highest of theirs. On 75 all are
# started again, unless the signal came to this script or --max-time is given.
set -u
count=${1:?how many processes}
shift
given=${JAX_COORDINATOR_ADDRESS:-}
export JAX_NUM_PROCESSES=$count AUTORETOUCH_GIVE_UP=${AUTORETOUCH_GIVE_UP:-3} # starts in a row without a checkpoint
if ! command -v nvidia-smi >/dev/null; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=${FAKE:-1}"
fi

again=1 stopped=0 processes=()
case " $* " in *" --max-time"*) again=0 ;; esac
trap 'again=0 stopped=1; kill -TERM "${processes[@]}" 2>/dev/null' TERM
trap 'again=0' INT # the terminal sends it to the processes as well

for ((start = 0; ; start++)); do
  # A new port for every start: the last one may still be in use.
  export JAX_COORDINATOR_ADDRESS=${given:-127.0.0.1:$((20000 + ($$ + start) % 20000))}
  processes=()
  for ((number = 0; number < count; number++)); do
    JAX_PROCESS_ID=$number CUDA_VISIBLE_DEVICES=$number autoretouch train "$@" &
    processes+=($!)
  done
  [ "$stopped" -eq 0 ] || kill -TERM "${processes[@]}" # the signal may have come before they were started
  highest=0
  for process in "${processes[@]}"; do
    while kill -0 "$process" 2>/dev/null; do wait "$process"; done # a trap interrupts wait
    wait "$process"
    status=$?
    [ "$status" -gt "$highest" ] && highest=$status
  done
  [ "$highest" -eq 75 ] && [ "$again" -eq 1 ] || exit "$highest"
  echo "local.sh: status 75, starting again" >&2
done

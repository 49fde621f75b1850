#!/bin/bash
# How to: bash launch/local.sh 8 CONFIG --workdir runs/a     (8 processes on this machine, one GPU each)
# Without GPUs each process gets one fake CPU device; FAKE=4 gives each four. The status is the highest of theirs.
set -u
count=${1:?how many processes}
shift
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:$((20000 + $$ % 20000))} JAX_NUM_PROCESSES=$count
if ! command -v nvidia-smi >/dev/null; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=${FAKE:-1}"
fi

processes=()
for ((number = 0; number < count; number++)); do
  JAX_PROCESS_ID=$number CUDA_VISIBLE_DEVICES=$number autoretouch train "$@" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM
trap : INT # the terminal sends it to the processes as well

highest=0
for process in "${processes[@]}"; do
  while kill -0 "$process" 2>/dev/null; do wait "$process"; done # a trap interrupts wait
  wait "$process"
  status=$?
  [ "$status" -gt "$highest" ] && highest=$status
done
exit "$highest"

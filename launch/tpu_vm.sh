#!/bin/bash
# How to: TPU=name ZONE=us-west4-a TYPE=v5litepod-256 IMAGE=… bash launch/tpu_vm.sh CONFIG --workdir gs://BUCKET/RUN
# Requests the slice (SPOT=1: a spot slice) and trains on every host; starts again after status 75 or a lost slice.
set -u
: "${TPU:?a name for the slice}" "${ZONE:?}" "${TYPE:?accelerator type}" "${IMAGE:?launch/Dockerfile built with ACCELERATOR=tpu}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
PAUSE=${PAUSE:-60}
GIVE_UP=${AUTORETOUCH_GIVE_UP:-3} # after so many starts in a row without a checkpoint

queue() { local verb=$1; shift; gcloud compute tpus queued-resources "$verb" "$TPU" --zone="$ZONE" "$@"; }
state() { queue describe --format='value(state.state)' 2>/dev/null; }

# Every host runs the image once, in the background, and waits for its status: when ssh breaks off, gcloud runs this
# again and it follows the same container.
host="sudo docker inspect autoretouch >/dev/null 2>&1 ||
  sudo docker run --detach --name autoretouch --privileged --net=host --env AUTORETOUCH_GIVE_UP=$GIVE_UP \
    $IMAGE train$(printf ' %q' "$@") || exit 1
sudo docker logs --follow autoretouch
status=\$(sudo docker wait autoretouch)
sudo docker rm autoretouch >/dev/null
exit \$status"

while true; do
  case $(state) in
    ACTIVE)
      gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$host"
      status=$?
      # 75: stopped with a checkpoint; 255: ssh broke off. Any other status ends the run, unless the slice is gone.
      case $status in 75 | 255) sleep "$PAUSE" ;; *) [ "$(state)" = ACTIVE ] && exit "$status" ;; esac ;;
    FAILED | SUSPENDED) queue delete --force --quiet || exit 1 ;; # a lost slice does not come back by itself
    "") queue create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot} || exit 1 ;;
    *) sleep "$PAUSE" ;;
  esac
done

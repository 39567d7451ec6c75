#!/bin/bash
# On a machine without Slurm: runs a training command, and again from its newest checkpoint when it dies.
#   accelerate_configs/cluster/restart.sh accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml recipes/qwen3_lora.py
# RESTARTS=5 at most, after PAUSE=10 seconds, doubled each time; a run of over HEALTHY=3600 seconds counts from 0 again.
set -u
restarts=${RESTARTS:-5} pause=${PAUSE:-10} healthy=${HEALTHY:-3600}

if [ $# = 0 ]; then
    sed -n '2,4s/^# *//p' "$0" >&2
    exit 2
fi
stopped=
trap 'stopped=1' INT TERM HUP  # the command gets it too; asked to stop, it must not come back

count=0
while :; do
    started=$SECONDS
    "$@" --resume_from_checkpoint true
    code=$?
    if [ $code = 0 ]; then exit 0; fi
    if [ -n "$stopped" ] || [ $code = 130 ] || [ $code = 143 ]; then exit $code; fi
    if [ $((SECONDS - started)) -gt "$healthy" ]; then count=0; fi
    count=$((count + 1))
    if [ $count -gt "$restarts" ]; then
        echo "restart.sh: exit code $code after $restarts restarts: given up" >&2
        exit $code
    fi
    wait=$((pause * 2 ** (count - 1)))
    echo "restart.sh: exit code $code: restart $count of $restarts in $wait s" >&2
    sleep "$wait"
    if [ -n "$stopped" ]; then exit $code; fi
done

#!/usr/bin/env bash
# Go on with a run on machines that come and go, with torchrun's own restarts; the same command on every machine:
#
#   MACHINES=1:4 ENDPOINT=first-machine:29400 launch/elastic.sh ddp NAME [--workers 4 ...]
#
# The run exists already (begin it with train.sh, and stop it): a restarted process repeats its command, and only `--resume NAME` can be
# repeated. When a machine leaves or joins, all processes start again from the last checkpoint, in whatever number there is then; the number
# must divide the batch size. Prefer train.sh or slurm.sbatch where the number of machines is fixed.
set -euo pipefail

if (($# < 2)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
engine=$1 run=$2
shift 2
python=${PYTHON:-python3}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$gpus}
if ((processes < 1)); then
    echo "error: no GPU here; PROCESSES=2 trains with two processes on the CPU" >&2
    exit 2
fi

# What `accelerate launch` would set from launch/accelerate/; torchrun sets none of it.
case $engine in
    ddp) ;;
    fsdp2) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 ;;
    zero[123]) export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=${engine#zero} ;;
    zero3_offload)
        export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3
        export ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=cpu
        ;;
    *)
        echo "error: no engine $engine; engines: ddp fsdp2 zero1 zero2 zero3 zero3_offload" >&2
        exit 2
        ;;
esac
if ((gpus == 0)); then
    export ACCELERATE_USE_CPU=true DS_ACCELERATOR=cpu
fi

# Without this, restarted processes read the rendezvous keys of the attempt before, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600} # seconds that the launcher leaves its ranks to save; 30 unless told
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap '' USR1 # a launcher dies of it; the ranks handle it
# `--` ends torchrun's own options: it would take --run for a short form of its --run-path.
exec "$python" -m torch.distributed.run --nnodes "${MACHINES:-1}" --nproc_per_node "$processes" --max_restarts "${RESTARTS:-10}" \
    --rdzv_backend c10d --rdzv_endpoint "${ENDPOINT:-localhost:29400}" --rdzv_id "${RDZV_ID:-$(basename -- "$run")}" \
    -m -- meme_dist train --resume "$run" "$@"

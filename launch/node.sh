#!/usr/bin/env bash
# What slurm.sbatch starts on every machine: one launcher, and through it one process a GPU. Not to be called by hand.
#
#   srun ... launch/node.sh ENGINE [words of `meme-dist train`]
#
# MASTER_ADDR and MASTER_PORT name the first machine; machine number and count are Slurm's.
set -euo pipefail

# Slurm signals every process of a step, and a launcher dies of SIGUSR1 and leaves its ranks behind. Ignored here, it is ignored by what is
# started from here; the ranks set a handler of their own.
trap '' USR1

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
engine=$1
shift
python=${PYTHON:-python3}
local=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if ((local < 1)); then
    echo "error: $(hostname): no GPU; PROCESSES=n trains on its CPU" >&2
    exit 2
fi
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600} # seconds that the launcher leaves its ranks to save; 30 unless told
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$local} > local ? ${SLURM_CPUS_PER_TASK:-$local} / local : 1))}
exec "$python" -m accelerate.commands.accelerate_cli launch --config_file "$here/accelerate/$engine.yaml" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * local))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --rdzv_backend static \
    -m meme_dist train "$@"

#!/usr/bin/env bash
# Train on one machine, with all its GPUs (or PROCESSES of them), and start again whatever dies:
#
#   launch/train.sh ENGINE RECIPE --run NAME [settings of the recipe]
#   PROCESSES=4 launch/train.sh zero2 digits --run big --batch-size 4096
#   PROCESSES=2 launch/train.sh ddp digits --run tried          # without a GPU: two processes, gloo between them
#   SUPERVISE='--again' launch/train.sh ddp digits --run tried  # the run may exist already: go on with it
#
# ENGINE is the name of a file in launch/accelerate/. Everything after it goes to `meme-dist train`. SIGTERM, SIGUSR1 or Ctrl-C: the ranks
# save and the script ends with 75; the same command with --again goes on. Ends with 0 when trained, 2 for a mistake, 1 when it gave up.
set -euo pipefail

if (($# < 2)); then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
engine=$here/accelerate/$1.yaml
shift
if [[ ! -f $engine ]]; then
    echo "error: no $engine; engines: $(cd -- "$here/accelerate" && printf '%s ' *.yaml)" >&2
    exit 2
fi

python=${PYTHON:-python3}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$gpus}
if ((processes < 1)); then
    echo "error: no GPU here; say how many processes shall train on the CPU: PROCESSES=2 $0 ..." >&2
    exit 2
fi
cores=$(nproc)
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600} # seconds that the launcher leaves its ranks to save; 30 unless told
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
if ((gpus == 0)); then
    export ACCELERATE_USE_CPU=true DS_ACCELERATOR=cpu
fi

# shellcheck disable=SC2086 # SUPERVISE holds several words on purpose
exec "$python" -m meme_dist.supervise ${SUPERVISE:-} -- \
    "$python" -m accelerate.commands.accelerate_cli launch --config_file "$engine" --num_processes "$processes" --main_process_port 0 \
    -m meme_dist train "$@"

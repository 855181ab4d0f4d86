#!/bin/bash
# Two machines of eight GPUs under SLURM, back in the queue until the run is finished. From the top of the repository:
#     sbatch recipes/slurm.sh --dataset_name my_images --output_dir runs/mine
#SBATCH --job-name=umae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180

# Three minutes before its time is up this script gets SIGTERM, and hands it on: srun to torchrun, torchrun to the
# training processes, which save where they are and end. The job then goes back into the queue, and on from there.
trap 'stopped=yes; kill -TERM "$step"' TERM
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$0" \
    --master_addr "$1" --master_port 29500 -m umae pretrain "${@:2}"' "${SLURM_GPUS_ON_NODE:-1}" "$address" "$@" &
step=$!
wait "$step"
status=$?
if [ "$stopped" ]; then
    wait "$step"  # the signal ended the first one
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

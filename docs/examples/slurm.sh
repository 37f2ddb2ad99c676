#!/bin/bash
# softprompt on two machines of a Slurm cluster: sbatch docs/examples/slurm.sh
# The current folder and the store are on a file system that all machines see. Preempted or killed, the job is queued
# again, and --resume goes on.
#SBATCH --job-name=softprompt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

export SOFTPROMPT_HOME="$PWD/store"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first:29500" \
  -m softprompt train train.jsonl \
  --validation dev.jsonl \
  --name sst2 \
  --batch-size 64 \
  --resume

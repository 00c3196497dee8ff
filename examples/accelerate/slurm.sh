#!/bin/bash
#SBATCH --job-name=cjepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# The whole pipeline on several machines; every step can be interrupted and submitted again. All machines see $WORK.
#   WORK=/shared/cjepa ENCODER=/shared/encoder sbatch examples/accelerate/slurm.sh
set -euo pipefail
: "${WORK:?folder that all machines see}" "${ENCODER:?folder or Hub id of a slot encoder}"
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# launch PROCESSES_PER_MACHINE command ...
launch() {
  local processes=$1
  shift
  srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$processes" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" --rdzv_id "$SLURM_JOB_ID" --no-python "$@"
}

# one process per machine, which starts a worker on each of its cores
launch 1 cjepa-hf collect push_t --output-dir "$WORK/episodes" --episodes 200000
# one process per GPU: each encodes every n-th file
launch "$GPUS" cjepa-hf extract "$WORK/episodes" --encoder "$ENCODER" --output-dir "$WORK/slots"
# --batch_size counts the samples of all GPUs together
launch "$GPUS" cjepa-hf train cjepa examples/push_t/world_model.yaml --dataset "$WORK/slots" --slot_encoder "$ENCODER" \
  --output_dir "$WORK/world_model" --batch_size 4096 --mixed_precision bf16
# each process plans with some of the seeds: at most one process per seed
launch 2 cjepa-hf evaluate --model "$WORK/world_model" --seeds 0 1 2 3 --output "$WORK/pusht-25.json"

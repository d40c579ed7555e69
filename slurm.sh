#!/usr/bin/env bash
# Train on many nodes with Slurm, one process per GPU, from the folder of main.py:
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=10 --time=2-00 slurm.sh [flags of main.py]
# The job is requeued after a preemption, the time limit or a node failure, and continues from its checkpoint.
#SBATCH --requeue --open-mode=append --signal=USR1@90
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 python main.py --resume auto "$@"
status=$?
# 143: stopped by a signal, with the state saved; 138: stopped by SIGUSR1 before training began
if [ $status = 143 ] || [ $status = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status

#!/bin/bash
# Score a reference cache with a Slurm array: one job plans, PARTS jobs of one GPU score, one job publishes.
#
#   PARTS=64 bash examples/slurm_precompute.sh --model /shared/base --data /shared/feedback.jsonl --out /shared/refs
#
# All jobs see the same paths. A part that is killed, or whose node is lost, is queued again and continues from the scores
# that it has flushed. The plan needs no GPU, so precision and engine are named for all jobs. Adapt memory and times.
set -euo pipefail

PARTS=${PARTS:-64}
score=(kto-precompute --dtype bfloat16 --backend transformers "$@")
line="exec $(printf '%q ' "${score[@]}")"
# Slurm tells a job a minute before it is stopped, and kto-precompute flushes its scores then.
submit=(sbatch --parsable --requeue --open-mode=append --signal=B:TERM@60 --output='%x-%A_%a.log')
gpu=(--gres=gpu:1 --cpus-per-task=4 --mem=64G --time=24:00:00)

plan=$("${submit[@]}" --job-name=kto-plan --cpus-per-task=16 --mem=32G --time=12:00:00 --wrap="$line --plan-only")
parts=$("${submit[@]}" --job-name=kto-part "${gpu[@]}" --array="0-$((PARTS - 1))" --dependency="afterok:$plan" \
  --wrap="$line --part \$SLURM_ARRAY_TASK_ID/$PARTS")
publish=$("${submit[@]}" --job-name=kto-publish "${gpu[@]}" --dependency="afterok:$parts" --wrap="$line")
echo "jobs $plan (plan), $parts (parts 0 to $((PARTS - 1))), $publish (publish)"

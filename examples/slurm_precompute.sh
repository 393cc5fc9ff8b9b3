#!/bin/bash
# Score a reference cache with a Slurm array: one job plans, PARTS jobs of one GPU score, one job publishes.
#
#   PARTS=64 bash examples/slurm_precompute.sh --model /shared/base --data /shared/feedback.jsonl --out /shared/refs
#
# All jobs see the same paths. A part that is killed, or whose node is lost, is queued again and continues from the scores
# that it has flushed; so is one that comes to the end of its time. The plan needs no GPU, so precision and engine are named for all jobs. Adapt memory and times.
set -euo pipefail

PARTS=${PARTS:-64}
score=(kto-precompute --dtype bfloat16 --backend transformers "$@")
line=$(printf '%q ' "${score[@]}")
# Slurm sends USR1 two minutes before the time limit.
submit=(sbatch --parsable --requeue --open-mode=append --signal=B:USR1@120 --output='%x-%A_%a.log')
gpu=(--gres=gpu:1 --cpus-per-task=4 --mem=64G --time=24:00:00)

# A job that fails would leave those after it waiting for ever, and reaching the time limit is a failure. So kto-precompute is
# told to flush its scores before, which ends it with 143, and the job is queued again. Jobs that are cancelled are not.
job() {
  cat <<END
trap 'late=1; kill -TERM \$command' USR1
trap 'kill -TERM \$command' TERM
$line $1 & command=\$!
wait \$command; code=\$?
while kill -0 \$command 2> /dev/null; do wait \$command; code=\$?; done
if [ "\${late:-0}" = 1 ] && [ \$code = 143 ]; then
  scontrol requeue "\$SLURM_JOB_ID"
  sleep 60 # until Slurm ends this one
fi
exit \$code
END
}

plan=$("${submit[@]}" --job-name=kto-plan --cpus-per-task=16 --mem=32G --time=12:00:00 --wrap="$(job --plan-only)")
parts=$("${submit[@]}" --job-name=kto-part "${gpu[@]}" --array="0-$((PARTS - 1))" --dependency="afterok:$plan" \
  --wrap="$(job "--part \$SLURM_ARRAY_TASK_ID/$PARTS")")
publish=$("${submit[@]}" --job-name=kto-publish "${gpu[@]}" --dependency="afterok:$parts" --wrap="$(job "")")
echo "jobs $plan (plan), $parts (parts 0 to $((PARTS - 1))), $publish (publish)"

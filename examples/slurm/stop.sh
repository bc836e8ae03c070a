# shellcheck shell=bash
# SLURM's warning becomes a checkpoint and a requeue. Sourced by train.sbatch, and part of what nemo_run_slurm.py writes.
# RUN is the folder of the run. The warning is USR1 to the batch shell: #SBATCH --signal=B:USR1@SECONDS.

# An older request is not meant for this job, and the ranks are told that it is gone: one that comes while they start
# counts.
if [ -e "$RUN/stop" ]; then
  echo "removed $RUN/stop: it asked for a stop before this job was started"
fi
rm -f "$RUN/stop" "$RUN/stopped.json"
export NEMO_EAFT_STOP_CLEARED=1

told=0
ask_to_stop() {
  told=$((told + 1))
  echo "USR1: asking the training to stop at its next step"
  # Whole or not at all, on a file system that other nodes read.
  echo "USR1 to the batch shell of job $SLURM_JOB_ID" > "$RUN/.stop.new"
  mv "$RUN/.stop.new" "$RUN/stop"
}
trap ask_to_stop USR1

# A trap runs only between commands, or while the shell waits for one in the background; then it ends the `wait`, not
# the command. A second `wait` for a command that has ended gives its exit code again.
in_background() {
  "$@" &
  local child=$! code before
  while :; do
    before=$told code=0
    wait "$child" || code=$?
    [ "$told" -ne "$before" ] || return "$code"
  done
}

requeue() {
  echo "requeueing job $SLURM_JOB_ID: $1"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}

# For a command that has ended well: requeues the job if SLURM's warning ended it, leaves with 75 if its owner did. The
# ranks of a run that was stopped end well, for torchrun takes anything else for a failure; their note tells.
end_if_stopped() {
  if [ -e "$RUN/stopped.json" ]; then
    if [ "$told" -gt 0 ]; then
      requeue "stopped on request, goes on from its checkpoint"
    fi
    exit 75
  fi
}

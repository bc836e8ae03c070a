#!/usr/bin/env bash
# One training run on several machines without a batch system. Start the same line on each of them:
#
#   HEAD=node0 NODES=2 examples/torchrun.sh CONF [key=value ...]
#
#   HEAD      name of one of the machines, the same everywhere; the others find each other through it
#   NODES     how many machines
#   GPUS      ranks on each; default 8
#   PORT      a free port of HEAD; default 29500
#   RESTARTS  how often all ranks are started again, from the newest checkpoint, when one failed or a machine was lost;
#             default 0. A machine that is back gets the same line again; the others wait ten minutes for it.
#
# A rank or a machine that is lost ends the others: run.stall_seconds at the latest after it fell silent. Not so if HEAD
# loses power: torchrun on the others then waits for its store for ever, when their ranks have ended (torch 2.13), and is
# to be ended by hand. A batch system does that.
#
# run.dir, HF_HOME and NEMO_EAFT_HOME must be folders that all machines see. Machines with several networks may need
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, and PET_LOCAL_ADDR where a machine's name is not that of its fast network.
# Without this file that is two lines on each machine:
#
#   . examples/environment.sh
#   torchrun --nnodes=2 --nproc-per-node=8 --rdzv-id=run --rdzv-backend=c10d --rdzv-endpoint=node0:29500 \
#     -m nemo_eaft.train CONF [key=value ...] trainer.num_nodes=2 trainer.gpus_per_node=8

set -euo pipefail

: "${HEAD:?set HEAD to the name of one machine, the same on all}"
: "${NODES:?set NODES to the number of machines}"
[ "$#" -ge 1 ] || { echo "usage: HEAD=... NODES=... torchrun.sh CONF [key=value ...]" >&2; exit 2; }
GPUS=${GPUS:-8}

# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# Every start of the ranks gets a store of its own. Torchrun's default is one for all of them: a machine that comes in
# later finds no address in it, and ranks that are started again find those of the ranks before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="${RESTARTS:-0}" \
  --rdzv-id=nemo-eaft --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" \
  -m nemo_eaft.train "$@" "trainer.num_nodes=$NODES" "trainer.gpus_per_node=$GPUS"

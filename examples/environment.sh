# shellcheck shell=bash
# Environment of a training on GPUs. Sourced by slurm/job.sh and torchrun.sh, and part of what nemo_run_slurm.py writes.
# A variable that is set already keeps its value.

# One queue between host and GPU, so that Megatron's overlapped tensor- and context-parallel communication starts in
# the order in which it was issued. For Hopper and before; Blackwell wants 32.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Communication frees its buffers by events instead of holding them, which saves memory.
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
# Communication kernels are not queued behind computation.
export TORCH_NCCL_HIGH_PRIORITY=${TORCH_NCCL_HIGH_PRIORITY:-1}
# NVLink SHARP reserves memory on every GPU; large models need it more.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# Streaming multiprocessors that LayerNorm leaves to communication running beside it.
export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-16}
export NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-16}
# Fewer out-of-memory errors from fragmentation. Not with CUDA graphs or NCCL user buffers.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# The tokenizer's threads and the data loader's processes would fight, and a fork after threads can deadlock.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-False}
# A wrong setting is reported in full.
export HYDRA_FULL_ERROR=${HYDRA_FULL_ERROR:-1}
# The log shows a line when it is printed.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
# NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN are left alone: Megatron-Core asserts that they agree with its
# attention_backend.

# All of them, for pyxis: in a container the image's own value of a variable holds unless it is named there.
# shellcheck disable=SC2034
ENVIRONMENT=CUDA_DEVICE_MAX_CONNECTIONS,TORCH_NCCL_AVOID_RECORD_STREAMS,TORCH_NCCL_HIGH_PRIORITY,NCCL_NVLS_ENABLE
ENVIRONMENT+=,NVTE_FWD_LAYERNORM_SM_MARGIN,NVTE_BWD_LAYERNORM_SM_MARGIN,PYTORCH_CUDA_ALLOC_CONF,TOKENIZERS_PARALLELISM
ENVIRONMENT+=,HYDRA_FULL_ERROR,PYTHONUNBUFFERED

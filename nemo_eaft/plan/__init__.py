"""``nemo-eaft plan``: what a run asks of its GPUs, worked out before there is one.

Nothing here imports NeMo or Megatron-Core, and nothing is built: the numbers are arithmetic on the model's
configuration and the settings. What Megatron-Core 0.15.3 allocates is the model, and each file names the upstream file
whose behaviour it follows. The exception is ``rehearsal/``, which builds, to compare.
"""

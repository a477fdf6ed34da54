"""One training job, set up from a recipe.

| file | what lives there |
| --- | --- |
| `state` | `Job`: all parts of the job, and the state that a checkpoint carries |
| `setup` | recipe -> `Job`, on all ranks together |
| `sharding` | parameters and optimizer state in shards (FSDP2) |
| `evaluation` | accuracy and loss over all ranks |
| `ema` | moving averages of the weights |
| `nonfinite` | losses and gradients that are not finite |
| `survivor` | what a rank saves when another one is lost |
| `buffers` | a copy of the network's buffers from before the step |
| `progress` | what a run shows while it goes |
| `rank_speed` | how long each rank computes in a step, and which one is slow |
| `profiler` | torch's profiler over a few steps |
"""

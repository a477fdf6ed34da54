"""One training job, set up from a recipe.

| file | what lives there |
| --- | --- |
| `state` | `Job`: all parts of the job, and the state that a checkpoint carries |
| `setup` | recipe -> `Job`, on all ranks together |
| `models`, `optimizers`, `schedules` | recipe -> network, optimizer, lr schedule |
| `sharding` | parameters and optimizer state in shards (FSDP2) |
| `sync_batchnorm` | batch normalization over all ranks on a CPU |
| `evaluation` | the test set over all ranks |
| `nonfinite` | losses and gradients that are not finite |
| `progress` | what a run shows while it goes |
| `profiler` | torch's profiler over a few steps |
"""

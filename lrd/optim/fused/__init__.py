"""Masked optimizer steps in one pass over the memory: the same bits as the ordinary way, faster.

The environment variable LRD_FUSED=0 switches it off, which costs speed and nothing else.

| file | what lives there |
| --- | --- |
| `dispatch` | decides which steps are taken over from torch, and takes them |
| `selftest` | compares the kernels with torch's optimizers before the first step |
| `cpu_step`, `cpu_kernels` | SGD and Adam on a CPU, compiled by Numba |
| `cuda_step`, `cuda_kernels` | SGD and Adam on a CUDA device, compiled by Triton |
"""

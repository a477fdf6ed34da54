"""Masked optimizer steps, for all tensors at once.

Some steps are taken over from torch: one pass over the memory updates and masks. After all other
steps dropped elements get their old values back, by one call of a kernel where kernels are loaded.
The bits are the same in all ways.

The environment variable LRD_FUSED=0 switches the kernels off, which costs speed and nothing else.

| file | what lives there |
| --- | --- |
| `dispatch` | decides which steps are taken over from torch, and takes them |
| `restore` | restores dropped elements after the steps that torch takes |
| `loading` | decides from which step on the kernels are loaded |
| `selftest` | compares the kernels with torch's optimizers before the first step |
| `cpu_step`, `cpu_kernels` | SGD and Adam on a CPU, compiled by Numba |
| `cuda_step`, `cuda_kernels` | SGD and Adam on a CUDA device, compiled by Triton |
"""

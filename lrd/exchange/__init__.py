"""What the ranks send each other of their gradients, in the place of DDP's own all-reduce.

| file | what lives there |
| --- | --- |
| `kept` | only the elements that the mask keeps: `lrd.exchange_kept` |
| `packing` | the kept elements of several parameters in one tensor, and back |
| `bf16` | all elements, in bfloat16 |
"""

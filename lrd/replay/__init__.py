"""A time machine over runs: any step of a run can be computed again.

Masks, the order of samples and their augmentation are functions of a seed and a position, and a
resume is exact. So a run that starts at a checkpoint, with the recipe, the code, and as many ranks
and threads as then, takes the same steps, bit for bit.

- `history`: what the files of a run say of its steps, and under which circumstances they were taken
- `computing`: computes steps again
- `records`: the scalars of a run, compared with those of a replay
- `rerun`, `verify`, `diff`, `fork`: the questions that are answered by it
- `probe`, `coverage`: the lr of any element at any step, for which nothing has to be computed again
"""
